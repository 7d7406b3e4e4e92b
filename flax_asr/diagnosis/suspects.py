"""Clips whose length does not go with their text: one of the two is probably wrong or cut."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32

from flax_asr import audio
from flax_asr.data import examples
from flax_asr.diagnosis import survey

_ODD = 4.0  # so many times the usual audio for a text, or so small a part of it
_MOST = 8  # clips that are shown


@dataclasses.dataclass(frozen=True)
class Odd:
    """A clip whose length does not go with its text.

    Attributes:
        id: of the clip.
        seconds, tokens: of its audio and its transcript.
        times_usual: its audio a token, as a multiple of the median.
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
        """For people, without its name."""
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
    """Those of the clips whose audio can be had, with it."""
    for clip in clips:
        for split in splits:
            samples = split.listen(clip.id)
            if samples is not None:
                yield clip, samples
                break
