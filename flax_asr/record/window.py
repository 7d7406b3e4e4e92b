"""The figures of a line of the log, over the updates since the line before."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from flax_asr import audio, errors, step
from flax_asr.data import buckets

_SUMS = ("updates", "finite", "loss", "infeasible", "blank", "real", "padded")
_LATEST = ("learning_rate", "grad_norm", "loss_scale", "skipped")
# Of the last update that was finite, however many lines ago; 0 before there was one.
_FINITE = ("finite_step", "finite_loss", "finite_grad_norm")

_MOST_NAMED = 32  # clips listed in a message


class Window:
    """Figures since the last line of the log; all but times survive a resume.

    Args:
        figures: what `as_json` returned at the checkpoint, or empty.
        hides_bad_losses: the loss is a mean over all updates, in which a non-finite loss counts as
            the mean before it.
        looks_ahead: the learning rate is that of the next update, not of the last one.
    """

    def __init__(
        self,
        figures: Mapping[str, float],
        hides_bad_losses: bool = False,
        looks_ahead: bool = False,
    ):
        self._hides_bad_losses, self._looks_ahead = hides_bad_losses, looks_ahead
        self._figures = dict.fromkeys((*_SUMS, *_LATEST, *_FINITE), 0) | dict(figures)
        self._started = time.monotonic()
        self._paused_seconds = 0.0
        self._waited_seconds = 0.0

    def as_json(self) -> dict[str, float]:
        """What a checkpoint stores, to continue the window after a resume."""
        return dict(self._figures)

    def add(
        self,
        step_number: int,
        metrics: step.Metrics,
        groups: Sequence[buckets.Group],
        lengths: Callable[[int], Int[np.ndarray, " clips"]],
        shapes: Sequence[int],
    ) -> None:
        """Counts the update `step_number`; `lengths(epoch)` are the samples of all clips."""
        finite = bool(metrics.finite)
        for name, value in {
            "updates": 1,
            "finite": int(finite),
            "loss": self._counted_loss(float(metrics.loss), finite),
            "infeasible": int(metrics.infeasible),
            "blank": float(metrics.blank_fraction) if finite else 0.0,
            "real": sum(
                int(lengths(group.epoch)[group.rows[group.rows >= 0]].sum(dtype=np.int64))
                for group in groups
            ),
            "padded": sum(int(shapes[group.shape]) * len(group.rows) for group in groups),
        }.items():
            self._figures[name] += value
        for name in _LATEST:
            self._figures[name] = getattr(metrics, name).item()
        if self._looks_ahead:
            self._figures["learning_rate"] = metrics.next_learning_rate.item()
        if finite:
            last = (step_number, float(metrics.loss), float(metrics.grad_norm))
            self._figures |= zip(_FINITE, last, strict=True)

    def too_many_bad(
        self, step_number: int, in_a_row: int, ids: Sequence[str]
    ) -> errors.TrainingError:
        """The error after too many non-finite updates in a row, the last with these clips."""
        more = f" and {len(ids) - _MOST_NAMED} more" if len(ids) > _MOST_NAMED else ""
        return errors.TrainingError(
            f"{in_a_row} updates in a row had a gradient that is not finite;"
            f" {self.last_finite()}. The last bad one was step {step_number} with the"
            f" clips {', '.join(ids[:_MOST_NAMED])}{more}. The weights are not affected."
            " Try a lower optim.learning_rate or train.mixed_precision bf16 or fp32, listen to"
            " these clips, and see whether loss or gradient norm rose before in the log."
        )

    def last_finite(self) -> str:
        """The figures of the last finite update, as text."""
        figures = self._figures
        if not figures["finite_step"]:
            return "no update was finite"
        return (
            f"the last finite one was at step {figures['finite_step']}: loss"
            f" {figures['finite_loss']:.4g}, gradient norm {figures['finite_grad_norm']:.4g}"
        )

    def facts(self) -> dict[str, str]:
        """What the progress bar shows."""
        figures = self._figures
        return {
            "loss": f"{self._mean_loss():.4g}",
            "audio s/s": f"{figures['real'] / audio.SAMPLE_RATE_HZ / self._seconds():.0f}",
            "padding": f"{1 - figures['real'] / figures['padded']:.0%}",
        }

    def close(self, waited_seconds: float) -> dict[str, float]:
        """The event for the log; begins a new window.

        Args:
            waited_seconds: time that the run has waited for data since it started.
        """
        figures, seconds = self._figures, self._seconds()
        event = {
            "loss": round(self._mean_loss(), 4),
            "learning_rate": figures["learning_rate"],
            "grad_norm": figures["grad_norm"],
            "loss_scale": figures["loss_scale"],
            "skipped_steps": figures["skipped"],
            "infeasible_clips": figures["infeasible"],
            "blank_fraction": round(self._mean("blank"), 4),
            "padding": round(1 - figures["real"] / figures["padded"], 4),
            "audio_seconds_per_second": round(figures["real"] / audio.SAMPLE_RATE_HZ / seconds, 2),
            "data_wait_seconds": round(waited_seconds - self._waited_seconds, 4),
            "time": round(time.time(), 3),
        }
        self._figures |= dict.fromkeys((*_SUMS, *_LATEST), 0)
        self._started, self._paused_seconds = time.monotonic(), 0.0
        self._waited_seconds = waited_seconds
        return event

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside this context does not count as training time."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused_seconds += time.monotonic() - began

    def _counted_loss(self, loss: float, finite: bool) -> float:
        """The value that an update adds to the sum of losses.

        Source: transformers 4.17, Trainer with `logging_nan_inf_filter`.
        """
        if self._hides_bad_losses and not math.isfinite(loss):
            return self._figures["loss"] / (1 + self._figures["updates"])
        return loss if finite or self._hides_bad_losses else 0.0

    def _mean_loss(self) -> float:
        if self._hides_bad_losses:
            return self._figures["loss"] / max(1, self._figures["updates"])
        return self._mean("loss")

    def _mean(self, name: str) -> float:
        """Mean over the finite updates; NaN if there was none."""
        figures = self._figures
        return figures[name] / figures["finite"] if figures["finite"] else float("nan")

    def _seconds(self) -> float:
        return max(1e-9, time.monotonic() - self._started - self._paused_seconds)
