"""Compares a model's output for a clip with its reference: the texts whose errors are counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from flax_asr import alignment, languages, metrics, scoring, vocabulary

_NO_CHARACTER = "\uffff"
"""Stands for the unknown token when errors are counted: a single character that is always wrong."""


@dataclass(frozen=True)
class Comparison:
    """How hypotheses are decoded from the frames and compared with references.

    Attributes:
        writes: the vocabulary of the model's head.
        language: its code, which says whether spaces separate words; otherwise spaces do not count.
        normalization: the steps that made the references, to be stated with the score.
        rewrite: the function that is applied to the model's text before the comparison, if it was
            trained on transcripts with other rules: capitals or marks must not count as errors.
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
        """How the score is computed, as one line to state with it: `scoring.rule`."""
        rewritten = self.rewrite is not None and not padded
        return scoring.rule(self.normalization, self.spaced, padded, rewritten)

    def texts(self, reference: str, frames: Int[np.ndarray, " frames"]) -> tuple[str, str, str]:
        """(Reference and hypothesis as their errors are counted, hypothesis as people read it).

        The unknown token is one wrong character in the second, and "[UNK]" in the third.

        Args:
            reference: the reference of the clip.
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
            labels: the labels of the clip.
            frames: the most likely symbol of each frame, including frames of padding.
        """
        heard = alignment.greedy_collapse(frames, self.writes.blank)
        texts = self.writes.decode(labels), self.writes.decode(heard)
        return metrics.written_errors(*texts), metrics.word_errors(*texts)
