"""Clip records from a Common Voice release, or from whatever else holds clips and sentences."""

import contextlib
import dataclasses
import functools
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from flax_asr import errors
from flax_asr.sources import archives, clips, hub, tables

Clip = clips.Clip
Source = clips.Source
names_of = clips.names_of
parquet_files = hub.parquet_files

# Tables of a release that are no splits.
_NO_SPLITS = ("reported", "clip_durations", "validated_sentences", "unvalidated_sentences")
_FORMS = (
    "a release folder, its .tar.gz, parquet:GLOB, hf:NAME[:CONFIG], or a .csv, .tsv or .jsonl "
    "manifest with the columns path and sentence"
)


def open_source(source: str, *, language: str, text_column: str | None = None) -> Source:
    """Finds out what `data.source` is, and what splits it has.

    Args:
        source: as in the configuration: a release folder (the language's own or the one above
            it), its .tar.gz, `parquet:GLOB`, `hf:NAME[:CONFIG]`, or a manifest.
        language: which of a release's languages.
        text_column: the column of the transcript; by default `sentence`.

    Raises:
        errors.DataError: it is not there, is nothing of these, or lacks a needed column.
    """
    column = text_column or "sentence"
    if source.startswith("parquet:"):
        return hub.parquet(source.removeprefix("parquet:"), column)
    if source.startswith("hf:"):
        return hub.dataset(source.removeprefix("hf:"), column)
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return _release_folder(path, language, column)
    if not path.is_file():
        raise errors.DataError(
            f"data.source {source}: nothing is there{errors.seen_from(path)}. It may be {_FORMS}"
        )
    if path.suffix.lower() in tables.SUFFIXES:
        return _manifest(path, column)
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar")):
        return _archive(path, language, column)
    raise errors.DataError(f"data.source {source}: cannot tell what it is. It may be {_FORMS}")


def _member_clip(number: int, row: Mapping[str, Any], column: str) -> Clip:
    """A row of a release as a clip without audio; its id is the path under `clips`."""
    name = str(row.get("path", ""))
    if not clips.is_inside(name):
        why = f"the path {name!r} leads out of the release" if name else "the row has no path"
        return clips.from_row(row, name or f"line {number}", column, refused=why)
    # The first releases left the extension out.
    id = name if pathlib.PurePosixPath(name).suffix else name + ".mp3"
    return clips.from_row(row, id, column)


# A release folder


def _tables_of(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    files = sorted(folder.glob("*.tsv"))
    return {file.stem: file for file in files if file.stem not in _NO_SPLITS}


def _release_folder(path: pathlib.Path, language: str, column: str) -> Source:
    path = path.resolve()
    candidates = [path, path / language, *sorted(path.glob(f"cv-corpus-*/{language}"))]
    folder = next((folder for folder in candidates if _tables_of(folder)), None)
    if folder is None:
        held = sorted(child.name for child in path.iterdir())
        languages = [name for name in held if _tables_of(path / name)]
        if languages:
            known = ", ".join(map(repr, languages[:40]))
            raise errors.DataError(f"{path}: a release without {language!r}; it has {known}")
        hint = ""
        if any(name.endswith(".parquet") for name in held):
            hint = f"; for parquet files write parquet:{path}/*.parquet"
        elif {"dataset_dict.json", "state.json"} & set(held):
            hint = f"; for a saved dataset write hf:{path}"
        raise errors.DataError(
            f"{path}: no train.tsv here or in {language}/, so this is no Common Voice release{hint}"
        )
    recordings = folder / "clips"
    if not recordings.is_dir():
        raise errors.DataError(f"{folder}: has tables, but no folder clips/; unpack all of it")
    readers = {
        split: functools.partial(_folder_clips, file, recordings, column)
        for split, file in _tables_of(folder).items()
    }
    return Source(str(folder), clips.release_name(folder), readers)


def _folder_clips(file: pathlib.Path, recordings: pathlib.Path, column: str) -> Iterator[Clip]:
    with tables.opened(file) as stream:
        for number, row in tables.rows(stream, str(file), ".tsv", ("path", column)):
            clip = _member_clip(number, row, column)
            path = None if clip.refused else str(recordings / clip.id)
            yield dataclasses.replace(clip, audio=path)


# A release as it is downloaded


def _archive(path: pathlib.Path, language: str, column: str) -> Source:
    """Goes through the archive once for the tables; every split read goes through it again.

    A .tar.gz cannot be entered in the middle. The tables wait in temporary files, the clips come
    in the archive's order, and nothing is unpacked onto the disk.
    """
    found: dict[str, dict[str, BinaryIO]] = {}
    release = path
    with contextlib.ExitStack() as stack:
        for name, _, body in archives.members(path):
            parts = pathlib.PurePosixPath(name).parts
            if len(parts) < 2 or not name.endswith(".tsv") or not clips.is_inside(name):
                continue
            split = parts[-1].removesuffix(".tsv")
            if split not in _NO_SPLITS:
                if parts[0].startswith("cv-corpus-"):
                    release = pathlib.Path(parts[0])
                spool = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(body, spool)
                found.setdefault(parts[-2], {})[split] = spool
        if not found:
            raise errors.DataError(f"{path}: no language folder with .tsv tables in this archive")
        if language not in found:
            held = ", ".join(map(repr, sorted(found)))
            raise errors.DataError(f"{path}: an archive without {language!r}; it has {held}")
        readers = {
            split: functools.partial(_archive_clips, path, language, split, spool, column)
            for split, spool in found[language].items()
        }
        source = Source(str(path), clips.release_name(release), readers)
        weakref.finalize(source, stack.pop_all().close)
    return source


def _archive_clips(
    path: pathlib.Path, language: str, split: str, spool: BinaryIO, column: str
) -> Iterator[Clip]:
    spool.seek(0)
    wanted: dict[str, list[Clip]] = {}
    refused = []
    for number, row in tables.rows(spool, f"{path}: {split}.tsv", ".tsv", ("path", column)):
        clip = _member_clip(number, row, column)
        if clip.refused:
            refused.append(clip)
        else:
            wanted.setdefault(clip.id, []).append(clip)
    marker = f"/{language}/clips/"
    if wanted:
        for name, size, body in archives.members(path):
            _, found, id = f"/{name}".partition(marker)
            if not found or id not in wanted:
                continue
            same = wanted.pop(id)
            if size > clips.MOST_BYTES:
                why = f"{size} bytes are no clip"
                refused.extend(dataclasses.replace(clip, refused=why) for clip in same)
            else:
                content = body.read()
                yield from (dataclasses.replace(clip, audio_bytes=content) for clip in same)
            if not wanted:
                break
    for same in wanted.values():
        refused.extend(dataclasses.replace(clip, refused="not in the archive") for clip in same)
    yield from refused


# A manifest


def _manifest(path: pathlib.Path, column: str) -> Source:
    """A table with the columns path and sentence; without a column split all of it is train."""
    splits: dict[str | None, None] = {}
    for number, row in _manifest_rows(path, column):
        split = row.get("split")
        # A short line, or an object without the key, would belong to every split.
        if split in ("", None) and ("split" in row or splits.keys() - {None}):
            raise errors.DataError(f"{path}, line {number}: the column split is empty")
        if split is not None and None in splits:
            raise errors.DataError(f"{path}, line {number}: has a split, but no line before it")
        splits[None if split is None else str(split)] = None
    if not splits:
        raise errors.DataError(f"{path}: a header and no clips")
    readers = {
        split or "train": functools.partial(_manifest_clips, path, split, column)
        for split in splits
    }
    return Source(str(path), path.stem, readers)


def _manifest_rows(path: pathlib.Path, column: str) -> Iterator[tables.Row]:
    with tables.opened(path) as stream:
        yield from tables.rows(stream, str(path), path.suffix.lower(), ("path", column))


def _manifest_clips(path: pathlib.Path, split: str | None, column: str) -> Iterator[Clip]:
    for number, row in _manifest_rows(path, column):
        if split is not None and str(row.get("split")) != split:
            continue
        name = row.get("path")
        if not isinstance(name, str) or not name or "\0" in name:
            yield clips.from_row(row, f"line {number}", column, refused="the row has no path")
            continue
        yield clips.from_row(
            row, name, column, audio=str(path.parent / pathlib.Path(name).expanduser())
        )
