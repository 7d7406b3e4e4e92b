"""The work of a preparation process: decodes one clip to int16 at 16 kHz. Light to import."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int16

from flax_asr import audio, errors
from flax_asr.data import shards


class Task(NamedTuple):
    """One clip to decode.

    Attributes:
        id: the clip's id.
        source: a file's path, or its bytes.
        min_seconds, max_seconds: inclusive bounds; the upper one applies before trimming, the lower
            one after it.
        trim_silence: whether to trim silence from both ends.
    """

    id: str
    source: str | bytes
    min_seconds: float
    max_seconds: float
    trim_silence: bool


class Decoded(NamedTuple):
    """A decoded clip: float value = pcm * gain; `digest` is `shards.pcm_digest`."""

    pcm: Int16[np.ndarray, " samples"]
    gain: float
    digest: str


def decode(task: Task) -> Decoded | shards.LeftOut:
    """Decodes a clip, or says why it cannot be used."""
    try:
        samples = audio.decode(task.source, max_seconds=task.max_seconds)
        if task.trim_silence:
            samples = audio.trim_silence(samples)
    except errors.AudioError as error:
        return shards.LeftOut(task.id, error.reason, error.detail)
    seconds = len(samples) / audio.SAMPLE_RATE_HZ
    if len(samples) > round(task.max_seconds * audio.SAMPLE_RATE_HZ):
        return shards.LeftOut(task.id, "too_long", f"{seconds:.3f} s")
    if len(samples) < max(round(task.min_seconds * audio.SAMPLE_RATE_HZ), 1):
        return shards.LeftOut(task.id, "too_short", f"{seconds:.3f} s")
    pcm, gain = audio.encode_int16(samples)
    return Decoded(pcm, gain, shards.pcm_digest(pcm, gain))
