"""The course of a run as a picture: losses above, error rates below."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_asr import atomic
from flax_asr.record import runlog

FILE = "curves.png"


def draw(run: Path) -> Path | None:
    """Writes RUN/curves.png from the log; returns its path, or None if nothing was logged."""
    history = runlog.read(run)
    losses = {
        "training loss": _points(history, "loss"),
        "validation loss": _points(history, "eval_loss"),
    }
    rates = {
        "character error rate": _points(history, "eval_cer"),
        "word error rate": _points(history, "eval_wer"),
    }
    panels = [panel for panel in (losses, rates) if any(panel.values())]
    if not panels:
        return None

    # Without pyplot: no display, no global state, safe beside threads.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2 * len(panels)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, lines in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for name, points in lines.items():
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker=".", markersize=4)
        values = [value for points in lines.values() for _, value in points]
        if lines is losses and min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
        if lines is rates:
            axes.set_ylim(0, None)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic.replacing(run / FILE) as unfinished:
        figure.savefig(unfinished, format="png")
    return run / FILE


def _points(history: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) for every event with a finite value."""
    return [
        (event["step"], event[name])
        for event in history
        if name in event and math.isfinite(event[name])
    ]
