"""A quick look at a corpus: its tables, and a decoded sample of its clips. No jax.

A prepared corpus is opened and known exactly. Otherwise sentences and speakers come from the
tables, lengths from `clip_durations.tsv` if the release has it, and a sample of the clips is
decoded to see whether they are usable.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from flax_asr import audio, common_voice, config, errors
from flax_asr.console import progress
from flax_asr.data import decoding, examples, pool, prepare, prepared_dir, shards
from flax_asr.sources import tables

MOST_HEARD = 2000
"""The most clips of a corpus that are decoded; smaller corpora are decoded completely."""

MOST_ROWS = 100_000
"""The most clips of a split that are judged one by one; the rest is assumed to be like them."""

UNKNOWN = -1
_LEAST_HEARD = 64  # whatever the time
_FROM_TABLES = frozenset({"empty_transcript", "duplicate"})
_BOUNDS = frozenset({"too_long", "too_short"})


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A split as far as it is known; `examples.build` takes `judged()` like a prepared split.

    Attributes:
        split, release: its name, and that of the corpus.
        ids, sentences, speakers: of every clip that was read, including those left out.
        samples: length at 16 kHz, `UNKNOWN` if the clip would have to be decoded.
        left_out: clips that cannot be used, and why; their length is `UNKNOWN`.
        heard: number of clips that were decoded.
        lengths_from: "prepared", "clip_durations.tsv" or "sample".
        complete: whether all clips could be read in time.
        audio_keys: clip id -> digest of the decoded audio.
        listen: clip id -> its audio at 16 kHz, None if that is not available.
    """

    split: str
    release: str
    ids: list[str]
    sentences: list[str]
    speakers: list[str]
    samples: Int32[np.ndarray, " clips"]
    left_out: list[shards.LeftOut]
    heard: int
    lengths_from: str
    complete: bool
    audio_keys: Mapping[str, str]
    listen: Callable[[str], Float32[np.ndarray, " samples"] | None]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def gains(self) -> Float32[np.ndarray, " clips"]:
        """Ones, as no audio is kept that they would scale."""
        return np.ones(len(self), np.float32)

    @property
    def maps(self) -> list[np.ndarray]:
        """Empty, as no audio is kept."""
        return []

    @property
    def scale(self) -> float:
        """Clips of the split for each one whose length, or reason to be left out, is known."""
        judged = int((self.samples != UNKNOWN).sum()) + len(self.left_out)
        return len(self) / judged if judged else 0.0

    @property
    def seconds(self) -> float:
        """Seconds of audio in all clips, extrapolated from those whose length is known."""
        known = self.samples[self.samples != UNKNOWN]
        return float(known.sum(dtype=np.int64)) / audio.SAMPLE_RATE_HZ * self.scale

    def vocabulary_sentences(self) -> list[str]:
        """Transcripts for the vocabulary: those of all clips that are not known to be unusable."""
        gone = {entry.id for entry in self.left_out if entry.reason != "duplicate"}
        pairs = zip(self.ids, self.sentences, strict=True)
        usable = [sentence for clip, sentence in pairs if clip not in gone]
        return list(_spread(usable, MOST_ROWS))

    def left_out_of(self) -> list[tuple[list[shards.LeftOut], int]]:
        """Clips left out, with the number of clips that were checked for their reasons."""
        everywhere = _FROM_TABLES | (_BOUNDS if self.lengths_from != "sample" else frozenset())
        of_all = [entry for entry in self.left_out if entry.reason in everywhere]
        of_heard = [entry for entry in self.left_out if entry.reason not in everywhere]
        return [(of_all, len(self)), (of_heard, max(self.heard, len(of_heard)))]

    def judged(self) -> "Split":
        """The clips whose length is known, at most `MOST_ROWS` of them."""
        rows = _spread(np.flatnonzero(self.samples != UNKNOWN), MOST_ROWS)
        return dataclasses.replace(
            self,
            ids=[self.ids[row] for row in rows],
            sentences=[self.sentences[row] for row in rows],
            speakers=[self.speakers[row] for row in rows],
            samples=self.samples[rows],
        )


def look(cfg: config.Config, *, read_seconds: float, hear_seconds: float) -> dict[str, Split]:
    """Looks at every split that the configuration names.

    Args:
        cfg: the configuration of the run.
        read_seconds: time limit for the tables; an archive or parquet files that take longer are
            read in part.
        hear_seconds: time limit for decoding the sample.

    Raises:
        errors.DataError: the source cannot be read, or lacks a split.
    """
    folders = prepared_dir.split_folders(cfg)
    if prepared_dir.is_prepared(cfg):
        return {name: _prepared(folder) for name, folder in folders.items()}
    source = common_voice.open_source(
        cfg.data.source, language=cfg.data.language, text_column=cfg.data.text_column
    )
    durations = _durations(source)
    share, seconds = MOST_HEARD // len(folders), read_seconds / len(folders)
    listed = {name: _Listed.read(source.read(name), share, seconds) for name in folders}
    if sum(len(found.clips) for found in listed.values()) <= MOST_HEARD:
        share = MOST_HEARD
    wanted = [
        (name, clip)
        for name, found in listed.items()
        for clip in _spread(found.audible(), share if found.by_path else len(found.clips))
    ]
    # Shuffled, so that clips for which there is no time are missing in all splits alike.
    order = np.argsort(np.random.PCG64(cfg.seed).random_raw(len(wanted)))
    heard = dict(_hear(cfg, [wanted[i] for i in order], hear_seconds))
    return {
        name: _judge(cfg, name, source.release, found, durations, heard)
        for name, found in listed.items()
    }


def _prepared(folder: Path) -> Split:
    found = shards.PreparedSplit.open(folder)
    return Split(
        split=found.split,
        release=found.release,
        ids=[*found.ids, *(entry.id for entry in found.left_out)],
        sentences=[*found.sentences, *("" for _ in found.left_out)],
        speakers=[*found.speakers, *("" for _ in found.left_out)],
        samples=np.concatenate(
            [found.samples, np.full(len(found.left_out), UNKNOWN, np.int32)], dtype=np.int32
        ),
        left_out=found.left_out,
        heard=len(found) + len(found.left_out),
        lengths_from="prepared",
        complete=True,
        audio_keys={},
        listen=functools.partial(_prepared_audio, found),
    )


def _prepared_audio(
    found: shards.PreparedSplit, clip: str
) -> Float32[np.ndarray, " samples"] | None:
    if clip not in found.ids:
        return None
    row = found.ids.index(clip)
    return found.audio(row) * found.gains[row]


def _source_audio(
    found: "_Listed", longest: float, clip_id: str
) -> Float32[np.ndarray, " samples"] | None:
    for clip in found.audible():
        if clip.id == clip_id:
            with contextlib.suppress(errors.AudioError):
                return audio.decode(clip.recording, max_seconds=longest)
    return None


def _durations(source: common_voice.Source) -> dict[str, int]:
    """Samples at 16 kHz of each clip that the release gives a duration for."""
    file = Path(source.name) / "clip_durations.tsv"
    if not file.is_file():
        return {}
    found: dict[str, int] = {}
    with open(file, "rb") as stream:
        for _, row in tables.rows(stream, str(file), ".tsv", ("clip", "duration[ms]")):
            with contextlib.suppress(KeyError, ValueError):  # a truncated line: skip that clip
                milliseconds = float(str(row["duration[ms]"]))
                found[str(row["clip"])] = round(milliseconds * audio.SAMPLE_RATE_HZ / 1000)
    return found


@dataclasses.dataclass(frozen=True)
class _Listed:
    """The clips of a split that were read; only some of those given by content keep it."""

    clips: list[common_voice.Clip]
    complete: bool
    by_path: bool

    @classmethod
    def read(cls, clips: Iterator[common_voice.Clip], keep: int, seconds: float) -> "_Listed":
        listed, by_path = [], True
        deadline = time.monotonic() + seconds
        for clip in clips:
            if clip.audio_bytes is not None:
                by_path = False
                if len(listed) >= keep:
                    clip = dataclasses.replace(clip, audio_bytes=None)
            listed.append(clip)
            if time.monotonic() > deadline:
                return cls(listed, False, by_path)
        return cls(listed, True, by_path)

    def audible(self) -> list[common_voice.Clip]:
        return [
            clip
            for clip in self.clips
            if not clip.refused and (clip.audio is not None or clip.audio_bytes is not None)
        ]


def _spread(items: Sequence[Any] | np.ndarray, count: int) -> Sequence[Any] | np.ndarray:
    """At most `count` of the items, evenly spaced, as tables are sorted by speaker."""
    if len(items) <= count:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, count).astype(int)]


class Heard(NamedTuple):
    """What is kept of a decoded clip: its length, and a key that is equal for equal audio."""

    samples: int
    key: str


def hear(task: decoding.Task) -> Heard | shards.LeftOut:
    """Decodes a clip in a worker process, and returns its length and key, not its audio."""
    result = decoding.decode(task)
    if isinstance(result, shards.LeftOut):
        return result
    return Heard(len(result.pcm), result.digest)


def _hear(
    cfg: config.Config, wanted: list[tuple[str, common_voice.Clip]], seconds: float
) -> Iterator[tuple[tuple[str, str], Heard | shards.LeftOut]]:
    """((split, clip id), result) for each clip that could be decoded in time."""
    tasks = (((split, clip.id), prepare.decoding_task(cfg, clip)) for split, clip in wanted)
    deadline = time.monotonic() + seconds
    workers = cfg.data.num_workers or pool.available_cores()
    with (
        progress.Progress(len(wanted), "listening", "clips") as bar,
        contextlib.closing(
            pool.run_ordered(hear, tasks, workers=workers, limit_seconds=prepare.CLIP_LIMIT_SECONDS)
        ) as results,
    ):
        for (split, clip_id), result in results:
            if isinstance(result, pool.Failure):
                result = shards.LeftOut(clip_id, result.reason, result.detail)
            yield (split, clip_id), result
            bar.advance()
            if time.monotonic() > deadline and bar.done >= _LEAST_HEARD:
                return


def _judge(
    cfg: config.Config,
    name: str,
    release: str,
    found: _Listed,
    durations: Mapping[str, int],
    heard: Mapping[tuple[str, str], Heard | shards.LeftOut],
) -> Split:
    samples = np.full(len(found.clips), UNKNOWN, np.int32)
    left_out: list[shards.LeftOut] = []
    keys: dict[str, str] = {}
    seen: set[str] = set()
    owners: dict[str, str] = {}
    for row, clip in enumerate(found.clips):
        result = prepare.left_out_unheard(clip, seen) or heard.get((name, clip.id))
        if isinstance(result, Heard):
            keys[clip.id] = result.key
            if owners.setdefault(result.key, clip.id) != clip.id:
                twin = owners[result.key]
                result = shards.LeftOut(clip.id, "same_audio", f"as {twin}")
        elif result is None and clip.id in durations:
            result = _within(cfg, clip.id, durations[clip.id])
        seen.add(clip.id)
        if isinstance(result, shards.LeftOut):
            left_out.append(result)
        elif result is not None:
            samples[row] = result.samples
    return Split(
        split=name,
        release=release,
        ids=[clip.id for clip in found.clips],
        sentences=[clip.sentence for clip in found.clips],
        speakers=[clip.speaker for clip in found.clips],
        samples=samples,
        left_out=left_out,
        heard=sum(split == name for split, _ in heard),
        lengths_from="clip_durations.tsv" if durations else "sample",
        complete=found.complete,
        audio_keys=keys,
        listen=functools.partial(_source_audio, found, cfg.data.max_seconds),
    )


def _within(cfg: config.Config, clip_id: str, samples: int) -> Heard | shards.LeftOut:
    """Checks a length that the release gives against the bounds of the configuration."""
    seconds = samples / audio.SAMPLE_RATE_HZ
    if seconds > cfg.data.max_seconds:
        return shards.LeftOut(clip_id, "too_long", f"{seconds:.3f} s")
    if seconds < cfg.data.min_seconds or samples <= 0:
        return shards.LeftOut(clip_id, "too_short", f"{seconds:.3f} s")
    return Heard(samples, "")


def shared(train: Mapping[str, Split], scored: Mapping[str, Split]) -> dict[str, dict[str, int]]:
    """For each scored split, the number of clips that are trained on, or share a speaker, a raw
    sentence or (if they were decoded) their audio with a training clip."""
    ids = {clip for split in train.values() for clip in split.ids}
    speakers = {who for split in train.values() for who in split.speakers if who}
    sentences = {said for split in train.values() for said in split.sentences if said.strip()}
    keys = {key for split in train.values() for key in split.audio_keys.values()}
    return {
        name: {
            "clips": sum(clip in ids for clip in split.ids),
            "speakers": sum(who in speakers for who in split.speakers),
            "sentences": sum(said in sentences for said in split.sentences),
        }
        | ({"audio": sum(key in keys for key in split.audio_keys.values())} if keys else {})
        for name, split in scored.items()
    }


def require_clips(split: Split) -> None:
    """Refuses a split of which no clip can be used.

    Raises:
        errors.DataError: with the reasons and the first clip.
    """
    if (split.samples != UNKNOWN).any():
        return
    why = shards.summary(split.left_out) or "none was read in time"
    first = "".join(f" The first: {e.id}: {e.reason} {e.detail}" for e in split.left_out[:1])
    raise errors.DataError(f"No clip of the split {split.split} can be used: {why}.{first}")


def usable(data: examples.Examples, splits: Sequence[Split], most: int | None) -> int:
    """Number of rows that all clips would give, extrapolated from those that were judged."""
    judged = 0.0
    for split in splits:
        known = int((split.samples != UNKNOWN).sum())
        judged += (known + len(split.left_out)) * min(known, MOST_ROWS) / known
    clips = round(data.clips_available * sum(map(len, splits)) / judged)
    return min(clips, most) if most is not None else clips
