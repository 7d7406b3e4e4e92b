"""Scores of a model on a set of clips: loss, WER and CER, with their uncertainty and scoring rule.

Only a few numbers are kept for each clip, so that a split of any size fits in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from flax_asr import metrics
from flax_asr.data import examples

FACTS = ("gender", "age", "accent")
"""Facts about speakers that scores are grouped by."""


@dataclass(frozen=True)
class Rate:
    """An error rate, with the bounds of its 95 % interval over clips."""

    counts: metrics.ErrorCounts
    low: float
    high: float

    @property
    def value(self) -> float:
        """Errors per unit of the references."""
        return self.counts.rate


@dataclass(frozen=True)
class PaddedScores:
    """Error rates of the same outputs with padding decoded too, as the scripts of 2022 did.

    Those are transformers' run_speech_recognition_ctc.py of that time and its like: docs/compat.md.
    """

    wer: Rate
    cer: Rate


@dataclass(frozen=True)
class GroupScores:
    """Scores of the clips for which a fact has this value."""

    fact: str
    value: str
    clips: int
    cer: float
    wer: float


@dataclass(frozen=True)
class Scores:
    """Scores of a model on a set of clips.

    Attributes:
        loss: mean over the clips that have an alignment, in the unit that training minimises.
        wer, cer: error rates over all clips.
        clips: number of scored clips.
        infeasible: number of clips without an alignment, whose loss is infinite.
        not_numbers: number of clips for which the model's scores are NaN, so that their text means
            nothing.
        blank_fraction: fraction of real frames whose most likely symbol is the blank.
        groups: scores by gender, age and accent, where known.
        spaced: whether the language separates words, so that spaces count and WER has a meaning.
        release, hash: the origin of the clips, as in `examples.Examples`.
        rule: how the error rates were computed.
        padded: error rates with padding, if asked for.
    """

    loss: float
    wer: Rate
    cer: Rate
    clips: int
    infeasible: int
    not_numbers: int
    blank_fraction: float
    groups: tuple[GroupScores, ...]
    spaced: bool
    release: str
    hash: str
    rule: str
    padded: PaddedScores | None = None

    def as_metrics(self, prefix: str) -> dict[str, float | str]:
        """The scores under their names in the log: `PREFIX_loss`, `PREFIX_wer`, `PREFIX_cer`, ...

        If there are padded error rates, they have these names, and those over real frames are
        `PREFIX_real_wer` and `PREFIX_real_cer`.
        """
        chosen = self if self.padded is None else self.padded
        wer, cer = chosen.wer, chosen.cer
        figures = {
            "loss": self.loss,
            "wer": wer.value,
            "cer": cer.value,
            "clips": self.clips,
            "cer_low": cer.low,
            "cer_high": cer.high,
            "wer_low": wer.low,
            "wer_high": wer.high,
            "infeasible_clips": self.infeasible,
            "blank_fraction": round(self.blank_fraction, 4),
            "release": self.release,
            "hash": self.hash,
            "rule": self.rule,
        }
        if self.padded is not None:
            figures |= {"real_wer": self.wer.value, "real_cer": self.cer.value}
        return {f"{prefix}_{name}": value for name, value in figures.items()}

    def describe(self, name: str) -> str:
        """Two lines of text: the scores, and what was scored and how."""
        parts = [
            f"{name} CER {self.cer.value:.4f} (95 %: {self.cer.low:.4f} to {self.cer.high:.4f})",
            f"WER {self.wer.value:.4f}" + ("" if self.spaced else " (says little: no spaces)"),
            f"loss {self.loss:.4f}",
            f"{self.clips} clips",
            f"{self.blank_fraction:.0%} blank",
        ]
        if self.infeasible:
            parts.append(f"{self.infeasible} clips without an alignment are not in the loss")
        if self.not_numbers:
            parts.append(f"for {self.not_numbers} clips the model's scores are NaN")
        if self.padded is not None:
            parts.append(
                "as the scripts of 2022 scored, with padded frames:"
                f" CER {self.padded.cer.value:.4f}, WER {self.padded.wer.value:.4f}"
            )
        return f"{', '.join(parts)}\n  {self.release}, {self.hash[:16]}; {self.rule}"

    def table(self) -> str:
        """Scores of groups of speakers, one per line; "" if nothing is known about speakers."""
        return "\n".join(
            f"  {g.fact:<7} {g.value[:40]:<40} {g.clips:>6} clips  CER {g.cer:.4f}  WER {g.wer:.4f}"
            for g in self.groups
        )


@dataclass(frozen=True, eq=False)
class Counts:
    """Counts for each row, stored by row, so that no row can count twice."""

    losses: Float[np.ndarray, " rows"]
    characters: Int[np.ndarray, "rows 2"]
    words: Int[np.ndarray, "rows 2"]
    frames: Int[np.ndarray, "rows 2"]
    padded_characters: Int[np.ndarray, "rows 2"]
    padded_words: Int[np.ndarray, "rows 2"]

    @classmethod
    def empty(cls, rows: int) -> "Counts":
        """Counts of rows that are not scored yet: NaN and -1."""
        return cls(
            np.full(rows, np.nan),
            *(np.full((rows, 2), -1, np.int32) for _ in range(5)),
        )


def rule(normalization: Any, spaced: bool, padded: bool = False, rewritten: bool = False) -> str:
    """How a score was computed, in one line; scores with equal lines can be compared."""
    steps = ", ".join(
        step if isinstance(step, str) else ": ".join(map(str, next(iter(step.items()))))
        for step in normalization
    )
    return "; ".join(
        [
            "greedy, " + ("padded frames too" if padded else "real frames only"),
            "CER over code points, spaces " + ("counted" if spaced or padded else "not counted"),
            "an unknown character is " + ('written "[UNK]"' if padded else "one error"),
            "normalisation"
            + (", also of what the model writes" if rewritten else "")
            + f": {steps or 'none'}",
        ]
    )


def summary(
    counts: Counts, data: examples.Examples, spaced: bool, padded: bool, rule: str, seed: int
) -> Scores:
    """The scores of all clips from the counts of each.

    Args:
        counts: one row for each clip of `data`.
        data: the scored clips.
        spaced, padded, rule: as in `Scores`; `padded` says whether to score padding as well.
        seed: the seed of the bootstrap.
    """
    aligned = ~np.isposinf(counts.losses)
    return Scores(
        loss=float(counts.losses[aligned].mean()) if aligned.any() else float("inf"),
        wer=_rate(counts.words, seed),
        cer=_rate(counts.characters, seed),
        clips=len(data),
        infeasible=int((~aligned).sum()),
        not_numbers=int(np.isnan(counts.losses).sum()),
        blank_fraction=_pooled(counts.frames).rate,
        groups=tuple(_groups(counts, data)),
        spaced=spaced,
        release=data.release,
        hash=data.hash,
        rule=rule,
        padded=(
            PaddedScores(_rate(counts.padded_words, seed), _rate(counts.padded_characters, seed))
            if padded
            else None
        ),
    )


def _pooled(pairs: Int[np.ndarray, "rows 2"]) -> metrics.ErrorCounts:
    wrong, units = pairs.sum(axis=0, dtype=np.int64)
    return metrics.ErrorCounts(int(wrong), int(units))


def _rate(pairs: Int[np.ndarray, "rows 2"], seed: int) -> Rate:
    return Rate(_pooled(pairs), *metrics.bootstrap_interval(pairs[:, 0], pairs[:, 1], seed))


def _groups(counts: Counts, data: examples.Examples) -> Iterator[GroupScores]:
    """Groups for each fact that is known of some clip, the largest first; also one for unknown."""
    rows_of: dict[str, dict[str, list[int]]] = {fact: {} for fact in FACTS}
    for row in range(len(data)):
        known = data.facts(row)
        for fact in FACTS:
            rows_of[fact].setdefault(known[fact], []).append(row)
    for fact, groups in rows_of.items():
        if groups.keys() == {""}:
            continue
        for value, rows in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
            yield GroupScores(
                fact,
                value or "unknown",
                len(rows),
                _pooled(counts.characters[rows]).rate,
                _pooled(counts.words[rows]).rate,
            )
