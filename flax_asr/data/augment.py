"""Augmentation of training clips that keeps their labels valid.

The augmentation of a clip is a function of seed, epoch and the clip's id only: it does not depend
on the order of clips, on batches or hosts, and is the same after a resume.

Speed changes lengths. They are known in advance, so that the batch plan of an epoch uses the
lengths of that epoch, and they are bounded: no clip becomes longer than the largest batch shape, or
too short for its label. A clip close to such a bound draws its speed from the rest of the range.
"""

import concurrent.futures
import hashlib
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float64, Int, Int16, Int32, UInt64

from flax_asr import alignment, audio, config
from flax_asr.data import examples, pool

_SPEED, _PITCH, _GAIN, _NOISE = range(4)

Clip = tuple[Int16[np.ndarray, " _"], float]
"""Float value = integer * gain."""


class Augmentation:
    """The augmentation of the clips of one run.

    Args:
        settings: the ranges.
        data: the clips.
        seed: the run's seed.
        longest: samples that no clip may exceed.
        smallest_samples: gives the fewest samples for a number of frames.
        workers: clips computed at the same time; by default one for each core.
    """

    def __init__(
        self,
        settings: config.AugmentConfig,
        data: examples.Examples,
        seed: int,
        *,
        longest: int,
        smallest_samples: Callable[[int], int],
        workers: int | None = None,
    ) -> None:
        self._settings, self._data, self._seed = settings, data, seed
        self._clip_keys = np.array([_clip_key(clip_id) for clip_id in data.ids], np.uint64)
        shortest = [
            smallest_samples(alignment.min_frames(data.labels(row))) for row in range(len(data))
        ]
        self._slowest = data.samples / longest
        self._fastest = data.samples / np.array(shortest)
        self._workers = workers or pool.available_cores()

    def lengths(self, epoch: int) -> Int32[np.ndarray, " rows"]:
        """Samples of every row in this epoch."""
        return self._lengths(epoch, np.arange(len(self._data)))

    def clips(self, epoch: int, rows: Iterable[int]) -> list[Clip]:
        """These rows with their augmentation in this epoch."""
        # New threads for each batch: cheap compared with its clips, and none outlives the run.
        with concurrent.futures.ThreadPoolExecutor(self._workers, "augment") as threads:
            return list(threads.map(lambda row: self.clip(epoch, row), rows))

    def clip(self, epoch: int, row: int) -> Clip:
        """One row with its augmentation in this epoch; its length is that of `lengths`."""
        settings, rows = self._settings, np.array([row])
        stored, gain = self._data.audio(row), float(self._data.gains[row])
        if settings.gain_db is not None:
            gain *= 10 ** (float(self._drawn(settings.gain_db, epoch, _GAIN, rows)[0]) / 20)
        if not any((settings.speed, settings.pitch, settings.noise_snr_db)):
            return stored, gain
        samples = stored.astype(np.float32) * np.float32(gain)
        if settings.speed is not None:
            samples = audio.stretch(samples, int(self._lengths(epoch, rows)[0]))
        if settings.pitch is not None:
            semitones = float(self._drawn(settings.pitch, epoch, _PITCH, rows)[0])
            samples = audio.shift_pitch(samples, semitones)
        if settings.noise_snr_db is not None:
            snr_db = float(self._drawn(settings.noise_snr_db, epoch, _NOISE, rows)[0])
            noise = np.random.default_rng([self._seed, epoch, int(self._clip_keys[row])])
            power = float(np.square(samples, dtype=np.float64).mean()) / 10 ** (snr_db / 10)
            samples = samples + np.float32(power**0.5) * noise.standard_normal(
                len(samples), np.float32
            )
        return audio.encode_int16(samples)

    def _lengths(self, epoch: int, rows: Int[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        samples = self._data.samples[rows]
        if self._settings.speed is None:
            return samples
        low, high = (
            np.clip(bound, self._slowest[rows], self._fastest[rows])
            for bound in self._settings.speed
        )
        factors = low + (high - low) * self._uniform(epoch, _SPEED, rows)
        return np.rint(samples / factors).astype(np.int32)

    def _drawn(
        self, bounds: tuple[float, float], epoch: int, purpose: int, rows: Int[np.ndarray, " n"]
    ) -> Float64[np.ndarray, " n"]:
        low, high = bounds
        return low + (high - low) * self._uniform(epoch, purpose, rows)

    def _uniform(
        self, epoch: int, purpose: int, rows: Int[np.ndarray, " n"]
    ) -> Float64[np.ndarray, " n"]:
        """Uniform numbers in [0, 1), one for each of these rows."""
        key = np.random.SeedSequence([self._seed, epoch, purpose]).generate_state(1, np.uint64)
        return (_mixed(self._clip_keys[rows] ^ key) >> np.uint64(11)) * 2.0**-53


def _clip_key(clip_id: str) -> int:
    text = clip_id.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _mixed(words: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Mixes words so that every bit of the result depends on every bit of the word.

    Source: Steele, Lea and Flood 2014, splitmix64's finaliser.
    """
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
