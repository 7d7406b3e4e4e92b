"""The phase of a run, judged from its losses and blanks: is it learning?

A model with a fresh head soon learns that outputting only blanks is the cheapest answer, and stays
there until it begins to use the audio: the blank plateau. Its loss is known before the run
(forecast.py), so a run that is stuck there, never gets there or falls back can be recognised.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flax_asr.estimate import forecast

logger = logging.getLogger(__name__)

BEGINNING, PLATEAU, LEARNING, DIVERGING = (
    "before the blank plateau",
    "on the blank plateau",
    "learning",
    "diverging",
)
NEAR = 1.25
"""A loss up to this multiple of the plateau's counts as the plateau: with dropout and masks it is a
little worse than that of a perfect unigram model."""
SILENT = 0.1
"""A model that outputs less than this fraction of the transcripts' tokens is silent."""
PATIENCE = 0.2
"""The fraction of the run, on the plateau or before it, after which the user is warned."""
_ADVICE = {
    BEGINNING: "It has not even learnt to output only blanks: the rate, or the number of updates,"
    " is probably much too small.",
    PLATEAU: "If the loss does not fall: a rate three times as high or as low, a longer"
    " optim.warmup_steps, more updates, or fewer masks (mask_time_prob).",
}
_ENDS = {
    BEGINNING: "before it has learnt how frequent each character is: its model is useless."
    " optim.learning_rate or the number of updates is much too small.",
    PLATEAU: "on the blank plateau: its model outputs next to nothing.",
    DIVERGING: "diverging: its model is worse than one that outputs nothing; optim.learning_rate is"
    " probably too high.",
}
_ENDS_UNTRAINED = (
    "without a finite update: its model is useless. optim.learning_rate is probably too high, or"
    " fp16 had too few updates to find its loss scale."
)


class Watch:
    """Names the phase of a run at each line of its log, and says when it changes.

    Args:
        expected: the losses of the training clips.
        fresh_head: whether the run starts with a fresh head.
        updates: number of updates of the run.
        history: the events of the log so far.
    """

    def __init__(
        self,
        expected: forecast.Losses,
        fresh_head: bool,
        updates: int,
        history: Sequence[Mapping[str, Any]],
    ):
        self._expected, self._fresh_head, self._updates = expected, fresh_head, updates
        self.phase: str | None = None
        self._since, self._warned = 0, False
        for event in history:
            if "phase" in event:
                self._move(event["phase"], event["step"])

    def expectations(self) -> dict[str, float]:
        """The first event of the log: what is known before the first update."""
        first = {"expected_first_loss": self._expected.first} if self._fresh_head else {}
        return {
            name: round(value, 4)
            for name, value in (
                first
                | {
                    "plateau_loss": self._expected.plateau,
                    "unigram_entropy": self._expected.unigram_entropy,
                }
            ).items()
        }

    def facts(self) -> dict[str, str]:
        """What the progress bar shows."""
        return {} if self.phase is None else {"model": self.phase}

    def look(self, step: int, figures: Mapping[str, float]) -> dict[str, str]:
        """Judges a line of the log, and returns what is added to it.

        Args:
            step: updates done.
            figures: at least `loss` and `blank_fraction`, means since the last line.
        """
        before, waited = self.phase, step - self._since
        self._move(self._judge(figures["loss"], figures["blank_fraction"]), step)
        said = {
            BEGINNING: self._beginning,
            PLATEAU: self._plateau,
            LEARNING: self._learning,
            DIVERGING: self._diverging,
        }
        if self.phase != before:
            logger.info("step %d: %s", step, said[self.phase](figures, before, waited))
        elif self.phase in _ADVICE and math.isfinite(figures["loss"]) and self._overdue(step):
            logger.warning(
                "step %d: still %s after %d of %d updates, with a loss of %.4g and a learning rate"
                " of %.2g. %s",
                step,
                self.phase,
                step - self._since,
                self._updates,
                figures["loss"],
                figures["learning_rate"],
                _ADVICE[self.phase],
            )
        if step == self._updates and self.phase != LEARNING:
            untrained = self.phase == BEGINNING and not math.isfinite(figures["loss"])
            ends = _ENDS_UNTRAINED if untrained else _ENDS[self.phase]
            logger.warning("step %d: the run ends %s", step, ends)
        return {"phase": self.phase}

    def _move(self, phase: str, step: int) -> None:
        if phase != self.phase:
            # The first phase begins with the run, not with its first line in the log.
            self._since = 0 if phase == BEGINNING else step
            self.phase, self._warned = phase, False

    def _overdue(self, step: int) -> bool:
        """Whether to warn of a long stay in this phase, once for each stay."""
        late = not self._warned and step - self._since >= PATIENCE * self._updates
        self._warned |= late
        return late

    def _judge(self, loss: float, blank_fraction: float) -> str:
        expected = self._expected
        if loss > 2 * max(expected.first, expected.plateau):
            return DIVERGING
        # In fp16 all first updates may be skipped, until the loss scale fits.
        if not math.isfinite(loss) or loss > NEAR * expected.plateau:
            return BEGINNING if self.phase in (None, BEGINNING) else DIVERGING
        return PLATEAU if 1 - blank_fraction < SILENT * expected.token_share else LEARNING

    def _beginning(self, figures, before, waited) -> str:
        if not math.isfinite(figures["loss"]):
            return "before the blank plateau: no update was finite yet"
        return (
            f"before the blank plateau: the loss, {figures['loss']:.4g}, is on its way from about"
            f" {self._expected.first:.4g} to about {self._expected.plateau:.4g}"
        )

    def _plateau(self, figures, before, waited) -> str:
        what = (
            f"a loss near {self._expected.plateau:.4g} is that of a model which outputs nothing and"
            " only knows how frequent each character is (unigram entropy"
            f" {self._expected.unigram_entropy:.4g} nats)"
        )
        if before == LEARNING:
            return f"fell back to the blank plateau: {what}; optim.learning_rate may be too high"
        return f"on the blank plateau: {what}; usual until it begins to use the audio"

    def _learning(self, figures, before, waited) -> str:
        written = 1 - figures["blank_fraction"]
        left = f"left the blank plateau after {waited} updates" if before == PLATEAU else "learning"
        return f"{left}: symbols on {written:.1%} of the frames, loss {figures['loss']:.4g}"

    def _diverging(self, figures, before, waited) -> str:
        return (
            f"diverging: the loss, {figures['loss']:.4g}, is worse than that of a model which"
            f" outputs nothing ({self._expected.plateau:.4g}); optim.learning_rate is probably too"
            " high"
        )
