"""Word and character error rates as counts of errors and units, summed first and divided once."""

import dataclasses

import jiwer
import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class ErrorCounts:
    """Edits between references and hypotheses, and units of the references; sum them, then divide.

    Attributes:
        errors: substitutions, deletions and insertions.
        units: words or characters of the references. An empty reference has none: any output
            for it counts as insertions.
    """

    errors: int = 0
    units: int = 0

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(self.errors + other.errors, self.units + other.units)

    @property
    def rate(self) -> float:
        """Errors per unit: 0 if there are neither, infinite if there are only errors."""
        return float(_rates(np.array(self.errors), np.array(self.units)))


def word_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Edits between words, separated by white space."""
    # jiwer splits at single spaces only.
    counts = jiwer.process_words(" ".join(reference.split()), " ".join(hypothesis.split()))
    return _counts(counts)


def character_errors(reference: str, hypothesis: str, count_spaces: bool = True) -> ErrorCounts:
    """Edits between code points.

    Args:
        reference, hypothesis: normalised texts; spaces at their ends are ignored.
        count_spaces: whether spaces count as characters; else all are removed first.
    """
    between = " " if count_spaces else ""
    counts = jiwer.process_characters(
        between.join(reference.split()), between.join(hypothesis.split())
    )
    return _counts(counts)


def written_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Edits between code points of the texts as they are, counting every space."""
    return _counts(jiwer.process_characters(reference, hypothesis))


def _counts(result: jiwer.WordOutput | jiwer.CharacterOutput) -> ErrorCounts:
    missed = result.substitutions + result.deletions
    return ErrorCounts(missed + result.insertions, result.hits + missed)


def _rates(errors: np.ndarray, units: np.ndarray) -> np.ndarray:
    nothing = np.where(errors > 0, np.inf, 0.0)
    return np.where(units > 0, errors / np.maximum(units, 1), nothing)


def bootstrap_interval(
    errors: Int[np.ndarray, " clips"],
    units: Int[np.ndarray, " clips"],
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of the pooled rate, drawing clips with replacement.

    Source: Bisani and Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance
    evaluation".

    Raises:
        ValueError: there is no clip, or the two arrays differ in length.
    """
    if len(errors) == 0 or len(errors) != len(units):
        raise ValueError(f"{len(errors)} error counts and {len(units)} unit counts")
    pairs = np.stack([errors, units]).astype(np.float64)
    generator = np.random.default_rng(seed)
    sums = np.empty((2, resamples))
    for draw in range(resamples):
        sums[:, draw] = pairs[:, generator.integers(len(errors), size=len(errors))].sum(axis=1)
    tail = (1 - level) / 2
    # Interpolation between two infinite rates would give NaN.
    low, high = np.quantile(_rates(*sums), [tail, 1 - tail], method="closest_observation")
    return float(low), float(high)
