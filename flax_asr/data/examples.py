"""Examples: prepared splits joined with labels, for the loader and for scoring.

Text is normalised and encoded at every start, so that prepared audio can be used with any
vocabulary. Clips that cannot be learnt from are left out and listed.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int, Int16, Int32, Int64

from flax_asr import alignment, audio, errors, vocabulary
from flax_asr.data import shards

FrameLengths = Callable[[Int[np.ndarray, " rows"]], Int[np.ndarray, " rows"]]


@runtime_checkable
class Split(Protocol):
    """The source of examples: a `shards.PreparedSplit`, or `survey.Split` for estimates.

    A surveyed split has no audio, and its `maps` are empty. Of a prepared split more members are
    used: `shards` and `offsets` with its `maps`, and `hash` and facts of speakers for scoring.
    """

    split: str
    release: str
    ids: list[str]
    sentences: list[str]
    speakers: list[str]
    samples: Int32[np.ndarray, " clips"]
    gains: Float32[np.ndarray, " clips"]
    maps: list[Int16[np.ndarray, " _"]]


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows to train on or to score; several splits may be joined.

    Attributes:
        splits: the splits that hold the audio.
        samples: length of each row at 16 kHz.
        gains: float value = int16 value * gain.
        label_lengths: tokens in each row.
        ids: unique clip ids.
        references: the normalised transcripts.
        left_out: clips of the splits that were left out, and why.
        clips_available: number of rows before `max_clips` was applied.
    """

    splits: tuple[Split, ...]
    samples: Int32[np.ndarray, " rows"]
    gains: Float32[np.ndarray, " rows"]
    label_lengths: Int32[np.ndarray, " rows"]
    ids: list[str]
    references: list[str]
    left_out: list[shards.LeftOut]
    clips_available: int
    _split_of: Int32[np.ndarray, " rows"] = field(repr=False)
    _clip_of: Int32[np.ndarray, " rows"] = field(repr=False)
    _maps: list[Int16[np.ndarray, " _"]] = field(repr=False)
    _map_of: Int32[np.ndarray, " rows"] = field(repr=False)
    _start: Int64[np.ndarray, " rows"] = field(repr=False)
    _tokens: Int32[np.ndarray, " tokens"] = field(repr=False)
    _token_start: Int64[np.ndarray, " rows"] = field(repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def seconds(self) -> float:
        """Seconds of audio in all rows."""
        return int(self.samples.sum(dtype=np.int64)) / audio.SAMPLE_RATE_HZ

    @property
    def release(self) -> str:
        """The release of the splits; different ones are joined by " + "."""
        return " + ".join(dict.fromkeys(split.release for split in self.splits))

    @property
    def hash(self) -> str:
        """Hash of audio, raw text and the selected rows: equal hashes mean the same clips.

        It includes their order, on which training depends, so an archive of a release has another
        hash than its folder.
        """
        content = [split.hash for split in self.splits] + self.ids
        return hashlib.sha256("\n".join(content).encode("utf-8", "surrogatepass")).hexdigest()

    def audio(self, row: int) -> Int16[np.ndarray, " samples"]:
        """The row's samples, straight from the memory map."""
        return self.recordings(np.array([row]))[0]

    def recordings(self, rows: Int[np.ndarray, " rows"]) -> list[Int16[np.ndarray, " _"]]:
        """The samples of each of these rows."""
        starts = self._start[rows]
        ends = starts + self.samples[rows]
        places = zip(self._map_of[rows].tolist(), starts.tolist(), ends.tolist(), strict=True)
        return [self._maps[number][start:end] for number, start, end in places]

    def labels(self, row: int) -> Int32[np.ndarray, " tokens"]:
        """The row's token ids."""
        start = self._token_start[row]
        return self._tokens[start : start + self.label_lengths[row]]

    def padded_labels(
        self, rows: Int[np.ndarray, " rows"], lengths: Int32[np.ndarray, " rows"], width: int
    ) -> Int32[np.ndarray, "rows width"]:
        """The first `lengths` token ids of each row, padded with 0.

        Raises:
            ValueError: one of the lengths is above `width`.
        """
        if lengths.max(initial=0) > width:
            raise ValueError(f"a row has {lengths.max()} labels, more than the width {width}")
        columns = np.arange(width)
        places = self._token_start[rows][:, None] + columns
        tokens = self._tokens.take(places, mode="clip")
        return np.where(columns < lengths[:, None], tokens, np.int32(0))

    def facts(self, row: int) -> dict[str, str]:
        """Speaker, age, gender and accent; "" where unknown."""
        split, clip = self.splits[self._split_of[row]], self._clip_of[row]
        return {
            "speaker": split.speakers[clip],
            "age": split.ages[clip],
            "gender": split.genders[clip],
            "accent": split.accents[clip],
        }

    def left_out_summary(self) -> str:
        """Reasons with their counts, such as "2 empty_transcript, 1 label_too_long", or ""."""
        return shards.summary(self.left_out)


def build(
    splits: Sequence[Split],
    *,
    normalize: Callable[[str], str],
    vocabulary: vocabulary.Vocabulary,
    frame_lengths: FrameLengths,
    exclude: Sequence[Split] = (),
    between: tuple[float, float] | None = None,
    max_clips: int | None = None,
    seed: int = 0,
) -> Examples:
    """Joins splits into one set of rows with labels.

    Left out are, in this order: a clip id that came before (`duplicate`); with `exclude`, clips
    whose id, speaker or normalised sentence is in one of those splits (`held_out_clip`,
    `held_out_speaker`, `held_out_sentence`: Common Voice's `validated` contains all of dev and
    test, and their prompts read by others); nothing left after normalisation
    (`empty_transcript`); more labels, with a blank between equal neighbours, than frames
    (`label_too_long`); with `between`, a length that is not strictly between (`too_short`,
    `too_long`).

    Args:
        splits: the splits to join, in this order.
        normalize: normalises a raw sentence.
        vocabulary: encodes the normalised sentence.
        frame_lengths: converts samples to frames of the model.
        exclude: splits that are scored and must not be trained on.
        between: exclusive bounds of the length, in seconds.
        max_clips: keep only so many rows, drawn from `seed`, in their order.
        seed: the seed of that draw.

    Raises:
        errors.DataError: nothing is left.
    """
    held_out = _HeldOut.of(exclude, normalize)
    low, high = (-1, np.inf) if between is None else np.multiply(between, audio.SAMPLE_RATE_HZ)
    seen: set[str] = set()
    left_out: list[shards.LeftOut] = []
    rows: list[tuple[int, int, str, np.ndarray]] = []
    for number, split in enumerate(splits):
        frames = frame_lengths(split.samples)
        for clip, clip_id in enumerate(split.ids):
            reference = normalize(split.sentences[clip])
            labels = vocabulary.encode(reference) if reference else np.zeros(0, np.int32)
            if clip_id in seen:
                reason, detail = "duplicate", "in an earlier split"
            elif found := held_out.reason(clip_id, split.speakers[clip], reference):
                reason, detail = found
            elif len(labels) == 0:
                reason, detail = "empty_transcript", repr(split.sentences[clip])
            elif (needed := alignment.min_frames(labels)) > frames[clip]:
                reason, detail = "label_too_long", f"{needed} frames needed, {frames[clip]} there"
            elif not low < split.samples[clip] < high:
                reason = "too_short" if split.samples[clip] <= low else "too_long"
                detail = f"{split.samples[clip] / audio.SAMPLE_RATE_HZ:.3f} s"
            else:
                rows.append((number, clip, reference, labels))
                seen.add(clip_id)
                continue
            left_out.append(shards.LeftOut(clip_id, reason, detail))
    if not rows:
        names = ", ".join(split.split for split in splits)
        why = shards.summary(left_out) or "there were none"
        raise errors.DataError(f"No clip of {names} can be used: {why}.")
    available = len(rows)
    if max_clips is not None and max_clips < available:
        # Ranks of raw bits, as numpy keeps the stream of a bit generator stable over versions.
        drawn = np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(available))
        rows = [rows[row] for row in sorted(drawn[:max_clips])]
    return _collect(splits, rows, left_out, available)


def _collect(
    splits: Sequence[Split],
    rows: Sequence[tuple[int, int, str, np.ndarray]],
    left_out: list[shards.LeftOut],
    available: int,
) -> Examples:
    split_of = np.array([number for number, _, _, _ in rows], np.int32)
    clip_of = np.array([clip for _, clip, _, _ in rows], np.int32)
    label_lengths = np.array([len(labels) for _, _, _, labels in rows], np.int32)
    maps: list[np.ndarray] = []
    map_of, start = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int64)
    for number, split in enumerate(splits):
        own = split_of == number
        if split.maps:  # else the corpus was only surveyed
            map_of[own] = len(maps) + split.shards[clip_of[own]]
            start[own] = split.offsets[clip_of[own]]
        maps += split.maps
    return Examples(
        splits=tuple(splits),
        samples=np.array([splits[s].samples[c] for s, c, _, _ in rows], np.int32),
        gains=np.array([splits[s].gains[c] for s, c, _, _ in rows], np.float32),
        label_lengths=label_lengths,
        ids=[splits[s].ids[c] for s, c, _, _ in rows],
        references=[reference for _, _, reference, _ in rows],
        left_out=left_out,
        clips_available=available,
        _split_of=split_of,
        _clip_of=clip_of,
        _maps=maps,
        _map_of=map_of,
        _start=start,
        _tokens=np.concatenate([labels for _, _, _, labels in rows]).astype(np.int32),
        _token_start=np.cumsum(label_lengths, dtype=np.int64) - label_lengths,
    )


@dataclass(frozen=True)
class _HeldOut:
    ids: frozenset[str]
    speakers: frozenset[str]
    sentences: frozenset[str]

    @classmethod
    def of(cls, splits: Sequence[Split], normalize: Callable[[str], str]) -> "_HeldOut":
        return cls(
            frozenset(clip_id for split in splits for clip_id in split.ids),
            frozenset(speaker for split in splits for speaker in split.speakers if speaker),
            frozenset(normalize(sentence) for split in splits for sentence in split.sentences),
        )

    def reason(self, clip_id: str, speaker: str, reference: str) -> tuple[str, str] | None:
        if clip_id in self.ids:
            return "held_out_clip", "is scored"
        if speaker in self.speakers:
            return "held_out_speaker", "speaks in a split that is scored"
        if reference and reference in self.sentences:
            return "held_out_sentence", "is read in a split that is scored"
        return None
