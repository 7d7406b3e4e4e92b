"""Clip records -> prepared splits, decoded in parallel, with the reason for every clip left out.

An interrupted preparation is checked and continued; finished splits are opened as they are.
The bytes written depend on the source and the settings, not on the number of processes.
"""

import contextlib
import errno
import itertools
import logging
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any

from flax_asr import common_voice, compat, config, errors
from flax_asr.console import progress, terminal
from flax_asr.data import decoding, pool, prepared_dir, remote, shard_writer, shards

logger = logging.getLogger(__name__)

CLIP_LIMIT_SECONDS = 60.0
_FLUSH_CLIPS = 64
_BATCH_CLIPS = 4


def prepare(
    cfg: config.Config, *, verify: bool = False, announce: bool = True
) -> dict[str, shards.PreparedSplit]:
    """Opens every split that the configuration names, preparing those that are not there yet.

    A clip is left out if `audio.decode` refuses its audio, its length is out of bounds, its
    transcript is empty, its id came before (`duplicate`), or its audio is bit for bit that of an
    earlier clip (`same_audio`: one of the two transcripts would be wrong, or a test clip count
    twice). If a decoding process dies or hangs, its clip is left out (`crashed`, `timeout`).

    Args:
        cfg: `data` names source and splits; `data.prepared_dir`, or else `output_dir`, the folder.
        verify: check the hashes of the audio that is already prepared.
        announce: log what was prepared.

    Raises:
        errors.DataError: the source cannot be read, a split is missing or has no usable clip, or a
            prepared split is damaged or was made from something else.
    """
    data, folders = cfg.data, prepared_dir.split_folders(cfg)
    there = prepared_dir.bucket_urls(cfg)
    for split, url in there.items():
        with prepared_dir.alone_in(folders[split]):
            remote.fetch(url, folders[split])
    missing = [split for split in folders if not shards.is_finished(folders[split])]
    if missing:
        cfg.require("data.source", "data.language")
        source = common_voice.open_source(
            data.source, language=data.language, text_column=data.text_column
        )
        for split in missing:
            source.read(split)  # refuses an unknown name now, not after hours of other splits
    prepared = {}
    for split in folders:
        settings = prepared_dir.made_from(cfg, split)
        if split in missing:
            with prepared_dir.alone_in(folders[split]):
                # Another process may have finished it while this one waited.
                if not shards.is_finished(folders[split]):
                    _prepare_split(cfg, source, split, folders[split], settings)
        prepared[split] = shards.PreparedSplit.open(folders[split], verify=verify)
        prepared_dir.check(prepared[split], settings)
        if split in missing and announce:
            logger.info("%s", report(prepared[split]))
        if split in there:
            remote.send(folders[split], there[split])
    return prepared


def command(cfg: config.Config) -> None:
    """`flax-asr prepare`: prepares missing splits and verifies the others. Prints what was left out
    and what the normalisation does to the transcripts.

    Raises:
        errors.DataError: as `prepare`; also if a byte of the audio has changed.
    """
    cfg.require("data.language")
    normalize = compat.normalizer(cfg)
    if normalize.is_default:
        terminal.show(
            f"no normalisation rule is written for {cfg.data.language}: the default one is used"
        )
    for split in prepare(cfg, verify=True, announce=False).values():
        terminal.show(report(split))
        for change in normalize.report(split.sentences):
            terminal.show(f"  {change.describe()}")


def report(split: shards.PreparedSplit) -> str:
    """One line about a prepared split, with the reasons for the clips left out."""
    line = f"{split.split}: {len(split)} clips, {split.seconds / 3600:.2f} h in {split.folder}"
    if split.left_out:
        line += f"; left out {len(split.left_out)}: {shards.summary(split.left_out)}"
        line += " (left_out.jsonl there names each)"
    return line


def _prepare_split(
    cfg: config.Config,
    source: common_voice.Source,
    split: str,
    folder: Path,
    settings: dict[str, Any],
) -> None:
    clips, total = _counted(source.read(split))
    workers = cfg.data.num_workers or pool.available_cores()
    try:
        with (
            shard_writer.ShardWriter(folder, settings=settings) as writer,
            progress.Progress(
                total, f"preparing {split}", "clips", initial=len(writer.done)
            ) as bar,
            contextlib.closing(
                pool.run_ordered(
                    decoding.decode,
                    _tasks(cfg, clips, writer.done, folder),
                    workers=workers,
                    limit_seconds=CLIP_LIMIT_SECONDS,
                    batch=_BATCH_CLIPS,
                )
            ) as results,
        ):
            for count, ((clip, left_out), result) in enumerate(results, 1):
                _record(writer, clip, left_out or result)
                if count % _FLUSH_CLIPS == 0:
                    writer.flush()
                bar.advance(1, left_out=len(writer.left_out))
            if writer.clips == 0:
                # Nothing is kept, as missing audio may be there the next time.
                writer.discard()
                first = "; ".join(f"{e.id}: {e.reason} {e.detail}" for e in writer.left_out[:1])
                raise errors.DataError(
                    f"No clip of the split {split} of {cfg.data.source} can be used:"
                    f" {shards.summary(writer.left_out) or 'it is empty'}."
                    + (f" The first: {first}" if first else "")
                )
            writer.finish(source=source.name, release=source.release, split=split)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = f"No space is left for {folder}: make room"
        else:
            why = f"The preparation in {folder} stopped ({error}): fix that"
        raise errors.DataError(
            f"{why}, or name another data.prepared_dir; in the same folder, preparation goes on"
            " where it stopped."
        ) from error


def _counted(
    clips: Iterator[common_voice.Clip],
) -> tuple[Iterable[common_voice.Clip], int | None]:
    """The clips, and their number, unless counting would hold their audio in memory."""
    clips = iter(clips)
    first = next(clips, None)
    if first is None:
        return [], 0
    if first.audio_bytes is not None:
        return itertools.chain([first], clips), None
    listed = [first, *clips]
    return listed, len(listed)


def _tasks(
    cfg: config.Config,
    clips: Iterable[common_voice.Clip],
    done: list[tuple[str, str]],
    folder: Path,
) -> Iterator[tuple[tuple[common_voice.Clip, shards.LeftOut | None], decoding.Task | None]]:
    """The decoding tasks that remain; clips that are left out undecoded have none."""
    seen = set()
    clip_iterator = iter(clips)
    for was in done:
        clip = next(clip_iterator, None)
        if clip is None or (clip.id, clip.sentence) != was:
            raise errors.DataError(
                f"{cfg.data.source} has changed since the preparation in {folder} was interrupted:"
                f" the clip {was[0]} is no longer in its place. Delete the folder to start again."
            )
        seen.add(clip.id)
    for clip in clip_iterator:
        left_out = left_out_unheard(clip, seen)
        seen.add(clip.id)
        yield (clip, left_out), None if left_out else decoding_task(cfg, clip)


def left_out_unheard(clip: common_voice.Clip, seen: Set[str]) -> shards.LeftOut | None:
    """Why a clip need not be decoded; `seen` holds the ids of earlier clips."""
    if clip.id in seen:
        return shards.LeftOut(clip.id, "duplicate", "the same id as an earlier clip")
    if clip.refused:
        return shards.LeftOut(clip.id, "missing", clip.refused)
    if not clip.sentence.strip():
        return shards.LeftOut(clip.id, "empty_transcript", "")
    return None


def decoding_task(cfg: config.Config, clip: common_voice.Clip) -> decoding.Task:
    """How a clip is decoded in this configuration."""
    return decoding.Task(
        id=clip.id,
        source=clip.recording,
        min_seconds=cfg.data.min_seconds,
        max_seconds=cfg.data.max_seconds,
        trim_silence=cfg.data.trim_silence,
    )


def _record(
    writer: shard_writer.ShardWriter,
    clip: common_voice.Clip,
    result: decoding.Decoded | shards.LeftOut | pool.Failure,
) -> None:
    if isinstance(result, pool.Failure):
        result = shards.LeftOut(clip.id, result.reason, result.detail)
    elif isinstance(result, decoding.Decoded) and result.digest in writer.digests:
        twin = writer.digests[result.digest]
        result = shards.LeftOut(clip.id, "same_audio", f"as {twin}")
    if isinstance(result, shards.LeftOut):
        writer.leave_out(clip.sentence, result)
        return
    facts = shards.ClipFacts(
        id=clip.id,
        sentence=clip.sentence,
        speaker=clip.speaker,
        age=clip.age,
        gender=clip.gender,
        accent=clip.accent,
    )
    writer.add(facts, result.pcm, result.gain, result.digest)
