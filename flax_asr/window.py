"""What the log says about the updates since its last line."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flax_asr import audio, step
from flax_asr.data import buckets, examples, loader


class Window:
    """Figures since the last line of the log; all but the clock's survive a resume.

    Args:
        totals: what `as_json` gave at the checkpoint, or nothing.
    """

    def __init__(self, totals: Mapping[str, float]):
        self._totals = dict(totals)
        self._started = time.monotonic()
        self._paused = 0.0
        self._waited = 0.0

    def as_json(self) -> dict[str, float]:
        return dict(self._totals)

    def add(
        self,
        metrics: step.Metrics,
        groups: Sequence[tuple[loader.Batch, buckets.Group]],
        data: examples.Examples,
        shapes: Sequence[int],
    ) -> None:
        """Counts one update."""
        rows = np.concatenate([group.rows for _, group in groups])
        real = data.samples[rows[rows >= 0]].sum(dtype=np.int64)
        padded = sum(shapes[group.shape] * len(group.rows) for _, group in groups)
        finite = bool(metrics.finite)
        for name, value in {
            "updates": 1,
            "finite": finite,
            "loss": float(metrics.loss) if finite else 0.0,
            "infeasible": float(metrics.infeasible),
            "blank": float(metrics.blank_fraction) if finite else 0.0,
            "real": int(real),
            "padded": int(padded),
        }.items():
            self._totals[name] = self._totals.get(name, 0) + value
        self._last = metrics

    def facts(self) -> dict[str, str]:
        """For the progress bar."""
        totals = self._totals
        seconds = max(1e-9, time.monotonic() - self._started - self._paused)
        return {
            "loss": f"{totals['loss'] / max(1, totals['finite']):.4g}",
            "audio s/s": f"{totals['real'] / audio.SAMPLE_RATE_HZ / seconds:.0f}",
            "padding": f"{1 - totals['real'] / totals['padded']:.0%}",
        }

    def close(self, waited: float) -> dict[str, float]:
        """The event of the log; begins a new window."""
        totals, last = self._totals, self._last
        seconds = max(1e-9, time.monotonic() - self._started - self._paused)
        finite = max(1, totals["finite"])
        event = {
            "loss": round(totals["loss"] / finite, 4),
            "learning_rate": float(last.learning_rate),
            "grad_norm": float(last.grad_norm),
            "loss_scale": float(last.loss_scale),
            "skipped_steps": int(last.skipped),
            "infeasible_clips": int(totals["infeasible"]),
            "blank_fraction": round(totals["blank"] / finite, 4),
            "padding": round(1 - totals["real"] / totals["padded"], 4),
            "audio_seconds_per_second": round(totals["real"] / audio.SAMPLE_RATE_HZ / seconds, 2),
            "data_wait_seconds": round(waited - self._waited, 4),
            "time": round(time.time(), 3),
        }
        self._totals, self._started, self._paused = {}, time.monotonic(), 0.0
        self._waited = waited
        return event

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count as training time."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began
