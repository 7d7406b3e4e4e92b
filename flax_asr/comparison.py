"""Compares what a model wrote for a clip with its reference: the texts whose errors are counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from flax_asr import alignment, languages, metrics, scoring, vocabulary

_NO_CHARACTER = "\uffff"
"""Stands for the unknown token where errors are counted: one character, and a wrong one."""


@dataclass(frozen=True)
class Comparison:
    """How hypotheses are read off the frames and compared.

    Attributes:
        writes: the vocabulary of the model's head.
        language: tells whether words are separated by spaces; else spaces count for nothing.
        normalization: the steps that made the references, to be named beside the score.
        rewrite: what is done to the model's text before it is compared, where it was trained on
            transcripts of other rules: capitals or marks would be errors that nobody hears.
    """

    writes: vocabulary.Vocabulary
    language: str
    normalization: Sequence
    rewrite: Callable[[str], str] | None = None

    @property
    def spaced(self) -> bool:
        """Whether spaces count."""
        return not languages.writes_without_spaces(self.language)

    def rule(self, padded: bool) -> str:
        """To be named beside a score: `scoring.rule`."""
        rewritten = self.rewrite is not None and not padded
        return scoring.rule(self.normalization, self.spaced, padded, rewritten)

    def texts(self, reference: str, frames: Int[np.ndarray, " frames"]) -> tuple[str, str, str]:
        """(Reference and hypothesis as their errors are counted, hypothesis as people read it).

        What the model could not spell is one wrong character in the second, "[UNK]" in the third.

        Args:
            reference: of the clip.
            frames: the most likely symbol of each real frame.
        """
        labels = alignment.greedy_collapse(frames, self.writes.blank)
        hypothesis, written = self.writes.decode(labels, _NO_CHARACTER), self.writes.decode(labels)
        if self.rewrite is not None:
            hypothesis = self.rewrite(hypothesis)
            written = hypothesis.replace(_NO_CHARACTER, "[UNK]")
        if self.writes.only_capitals:
            reference, hypothesis = reference.lower(), hypothesis.lower()
        return reference, hypothesis, written

    def padded_errors(
        self, labels: Int[np.ndarray, " tokens"], frames: Int[np.ndarray, " frames"]
    ) -> tuple[metrics.ErrorCounts, metrics.ErrorCounts]:
        """Errors of characters and of words as the scripts of 2022 counted them.

        Args:
            labels: of the clip.
            frames: the most likely symbol of each frame, of which some are padding.
        """
        heard = alignment.greedy_collapse(frames, self.writes.blank)
        texts = self.writes.decode(labels), self.writes.decode(heard)
        return metrics.written_errors(*texts), metrics.word_errors(*texts)
