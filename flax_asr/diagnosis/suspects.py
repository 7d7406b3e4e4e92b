"""Clips whose length does not fit their text: one of the two is probably wrong or cut off."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32

from flax_asr import audio
from flax_asr.data import examples
from flax_asr.diagnosis import survey

_ODD = 4.0  # times the usual audio for a text, or the usual audio divided by it
_MOST = 8  # clips that are shown


@dataclasses.dataclass(frozen=True)
class Odd:
    """A clip and how well its length fits its text.

    Attributes:
        id: the clip's id.
        seconds, tokens: length of its audio and of its transcript.
        times_usual: its audio per token, as a multiple of the median.
    """

    id: str
    seconds: float
    tokens: int
    times_usual: float

    @property
    def is_suspect(self) -> bool:
        """Whether it is so odd that something is probably wrong with it."""
        return not 1 / _ODD < self.times_usual < _ODD

    def describe(self) -> str:
        """A description as text, without its id."""
        return (
            f"{self.tokens} characters in {self.seconds} s, {self.times_usual:.2g} times as long"
            " as usual"
        )


def oddest(data: examples.Examples) -> list[Odd]:
    """Clips with far too little or too much audio for their text, the oddest first."""
    rates = data.samples / audio.SAMPLE_RATE_HZ / data.label_lengths
    times = rates / np.median(rates)
    rows = np.argsort(-np.abs(np.log(times)), kind="stable")[:_MOST]
    return [
        Odd(
            id=data.ids[row],
            seconds=round(int(data.samples[row]) / audio.SAMPLE_RATE_HZ, 3),
            tokens=int(data.label_lengths[row]),
            times_usual=float(times[row]),
        )
        for row in rows.tolist()
    ]


def audible(
    clips: Sequence[Odd], splits: Sequence[survey.Split]
) -> Iterator[tuple[Odd, Float32[np.ndarray, " _"]]]:
    """The clips whose audio is available, each with its samples at 16 kHz."""
    for clip in clips:
        for split in splits:
            samples = split.listen(clip.id)
            if samples is not None:
                yield clip, samples
                break
