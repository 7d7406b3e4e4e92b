"""Clip records from a Common Voice release, or from whatever else holds clips and sentences."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from flax_asr import errors, seals
from flax_asr.bucket import store
from flax_asr.sources import archives, clips, hub, manifests, spontaneous, tables

_Rows = Callable[[], Iterator[tables.Row]]

Clip = clips.Clip
Source = clips.Source

# Tables of a release that are no splits.
_NO_SPLITS = ("reported", "clip_durations", "validated_sentences", "unvalidated_sentences")
_FORMS = (
    "a release folder, its .tar.gz, parquet:GLOB, hf:NAME[:CONFIG], or a .csv, .tsv or .jsonl "
    "manifest with the columns path and sentence"
)
# What is none of these, and what to do with it.
_MENDED = {
    ".zip": "; unpack it and name the folder",
    ".parquet": "; write parquet: before it",
    ".json": "; a file with one object a line is called .jsonl",
}
_HASHED_BYTES = 512 * 2**20


def open_source(source: str, *, language: str, text_column: str | None = None) -> Source:
    """Finds out what `data.source` is, and what splits it has.

    Args:
        source: as in the configuration: a release folder (the language's own or the one above
            it), its .tar.gz, `parquet:GLOB`, `hf:NAME[:CONFIG]`, or a manifest.
        language: which of a release's languages; clips whose `locale` is another are warned of.
        text_column: the column of the transcript; by default `sentence`, in a release of
            spontaneous speech `transcription`.

    Raises:
        errors.DataError: it is not there, is nothing of these, or lacks a needed column.
    """
    column = text_column or "sentence"
    if source.startswith("parquet:"):
        return hub.parquet(source.removeprefix("parquet:"), column, language)
    if source.startswith("hf:"):
        return hub.dataset(source.removeprefix("hf:"), column, language)
    if store.is_remote(source):
        raise errors.DataError(
            f"data.source {source}: a corpus is read from a disk: copy it to this machine. What"
            " `flax-asr prepare` makes of it can lie in a bucket (data.prepared_dir)"
        )
    path = pathlib.Path(os.path.expanduser(source))
    if path.is_dir():
        return _release_folder(path.resolve(), language, text_column)
    if not path.is_file():
        raise errors.DataError(
            f"data.source {source}: nothing is there{errors.seen_from(path)}. It may be {_FORMS}"
        )
    if path.suffix.lower() in tables.SUFFIXES:
        return manifests.source(path, column, language)
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar")):
        return _archive(path, language, text_column)
    mend = _MENDED.get(path.suffix.lower(), "")
    raise errors.DataError(
        f"data.source {source}: cannot tell what it is{mend}. It may be {_FORMS}"
    )


def is_path(source: str) -> bool:
    """Whether `data.source` names a file or a folder: neither parquet files nor a dataset."""
    return not source.startswith(("parquet:", "hf:"))


def fingerprint(source: str, *, language: str | None, split: str) -> str | None:
    """Tells one version of a split's source from another; None where there is nothing.

    Args:
        source, language: as for `open_source`.
        split: under any of its names.
    """
    if source.startswith("hf:"):
        return hub.fingerprint(source.removeprefix("hf:"))
    if source.startswith("parquet:"):
        files = hub.parquet_files(source.removeprefix("parquet:"))
        found = next((files[name] for name in clips.names_of(split) if name in files), None)
        sizes = found and [(os.path.basename(file), os.path.getsize(file)) for file in found]
        return found and hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    table = path = pathlib.Path(source)
    if not path.is_file():
        table = _table_of(path, str(language), split)
    if table is None:
        return None
    size = table.stat().st_size
    if size > _HASHED_BYTES:  # an archive: reading it all takes minutes
        return f"{table.name} {size} bytes"
    return seals.sha256(table)


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


def _is_split(name: str) -> bool:
    return name not in _NO_SPLITS and not name.startswith((".", "ss-corpus-", "ss-reported-"))


def _tables_of(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    return {file.stem: file for file in sorted(folder.glob("*.tsv")) if _is_split(file.stem)}


def _folders_of(release: pathlib.Path, language: str) -> list[pathlib.Path]:
    """Where its tables can be: here, below, or below one of several releases, newest first."""
    several = sorted(release.glob(f"cv-corpus-*/{language}"))
    newest_first = sorted(several, key=clips.release_number, reverse=True)
    return [release, release / language, *newest_first]


def _table_of(release: pathlib.Path, language: str, split: str) -> pathlib.Path | None:
    """The table of a split in a release's folder, under either of its names."""
    folders = [folder for folder in _folders_of(release, language) if _tables_of(folder)]
    if not folders:
        return spontaneous.tables_below(release).get(language)
    files = (folder / f"{name}.tsv" for folder in folders for name in clips.names_of(split))
    return next((file for file in files if file.is_file()), None)


def _release_folder(path: pathlib.Path, language: str, text_column: str | None) -> Source:
    folders = _folders_of(path, language)
    folder = next((folder for folder in folders if _tables_of(folder)), None)
    if folder is None:
        spoken = spontaneous.tables_below(path)
        if language in spoken:
            return _spontaneous_folder(spoken[language], text_column or spontaneous.TEXT_COLUMN)
        held = sorted(child.name for child in path.iterdir())
        below = [*path.iterdir(), *path.glob("cv-corpus-*/*")]
        languages = sorted({*(child.name for child in below if _tables_of(child)), *spoken})
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
    column = text_column or "sentence"
    readers = {
        split: functools.partial(
            _folder_clips,
            functools.partial(_table_rows, file, column, language),
            _recordings(folder, "clips"),
            column,
        )
        for split, file in _tables_of(folder).items()
    }
    return Source(str(folder), clips.release_name(folder), readers)


def _spontaneous_folder(file: pathlib.Path, column: str) -> Source:
    recordings = _recordings(file.parent, spontaneous.RECORDINGS)
    with tables.opened(file) as stream:
        names = spontaneous.splits(stream, str(file), column)
    readers = {
        split: functools.partial(
            _folder_clips,
            functools.partial(_spontaneous_rows, file, column, split),
            recordings,
            "sentence",
        )
        for split in names
    }
    return Source(str(file.parent), clips.release_name(file.parent), readers)


def _recordings(folder: pathlib.Path, name: str) -> pathlib.Path:
    if not (folder / name).is_dir():
        raise errors.DataError(
            f"{folder}: has tables, but no folder {name}/; unpack all of it (of"
            " recordings of your own, name the table itself)"
        )
    return folder / name


def _table_rows(file: pathlib.Path, column: str, language: str) -> Iterator[tables.Row]:
    with tables.opened(file) as stream:
        yield from _scripted_rows(stream, str(file), column, language)


def _scripted_rows(stream: BinaryIO, name: str, column: str, language: str) -> Iterator[tables.Row]:
    # A folder or archive that holds tables itself is taken whatever it is called.
    rows = tables.rows(stream, name, ".tsv", ("path", column))
    return tables.of_language(rows, name, language)


def _spontaneous_rows(file: pathlib.Path, column: str, split: str) -> Iterator[tables.Row]:
    with tables.opened(file) as stream:
        yield from spontaneous.rows(stream, str(file), column, split)


def _folder_clips(rows: _Rows, recordings: pathlib.Path, column: str) -> Iterator[Clip]:
    for number, row in rows():
        clip = _member_clip(number, row, column)
        path = None if clip.refused else str(recordings / clip.id)
        yield dataclasses.replace(clip, audio=path)


# A release as it is downloaded


def _archive(path: pathlib.Path, language: str, text_column: str | None) -> Source:
    """Goes through the archive once for the tables; every split read goes through it again.

    A .tar.gz cannot be entered in the middle. The tables wait in temporary files, the clips come
    in the archive's order, and nothing is unpacked onto the disk.
    """
    scripted: dict[str, dict[str, BinaryIO]] = {}
    spoken: dict[str, BinaryIO] = {}
    release = path
    with contextlib.ExitStack() as stack:
        for name, _, body in archives.members(path):
            parts = pathlib.PurePosixPath(name).parts
            if not name.endswith(".tsv") or not clips.is_inside(name):
                continue
            split = parts[-1].removesuffix(".tsv")
            spoken_language = spontaneous.language_of(parts[-1])
            if spoken_language is None and not _is_split(split):
                continue
            if parts[0].startswith(("cv-corpus-", "sps-corpus-")):
                release = pathlib.Path(parts[0])
            spool = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(body, spool)
            if spoken_language is not None:
                spoken[spoken_language] = spool
            else:
                scripted.setdefault("/".join(parts[-2:-1]), {})[split] = spool
        if not scripted and not spoken:
            raise errors.DataError(f"{path}: no language folder with .tsv tables in this archive")
        # The archives of the first releases had no folder of the language.
        folder = language if language in scripted or language in spoken else ""
        if folder in scripted:
            readers = _scripted_members(path, folder, scripted[folder], text_column, language)
        elif language in spoken:
            readers = _spontaneous_members(path, spoken[language], text_column)
        else:
            held = ", ".join(map(repr, sorted({*scripted, *spoken})))
            raise errors.DataError(f"{path}: an archive without {language!r}; it has {held}")
        source = Source(str(path), clips.release_name(release), readers)
        weakref.finalize(source, stack.pop_all().close)
    return source


def _scripted_members(
    path: pathlib.Path,
    folder: str,
    spools: Mapping[str, BinaryIO],
    text_column: str | None,
    language: str,
) -> dict[str, Callable[[], Iterator[Clip]]]:
    column = text_column or "sentence"

    def rows(split: str) -> Iterator[tables.Row]:
        spools[split].seek(0)
        return _scripted_rows(spools[split], f"{path}: {split}.tsv", column, language)

    marker = f"/{folder}/clips/" if folder else "/clips/"
    return {
        split: functools.partial(
            _archive_clips, path, functools.partial(rows, split), marker, column
        )
        for split in spools
    }


def _spontaneous_members(
    path: pathlib.Path, spool: BinaryIO, text_column: str | None
) -> dict[str, Callable[[], Iterator[Clip]]]:
    table = (spool, str(path), text_column or spontaneous.TEXT_COLUMN)
    marker = f"/{spontaneous.RECORDINGS}/"
    return {
        split: functools.partial(
            _archive_clips,
            path,
            functools.partial(spontaneous.rows, *table, split),
            marker,
            "sentence",
        )
        for split in spontaneous.splits(*table)
    }


def _archive_clips(path: pathlib.Path, rows: _Rows, marker: str, column: str) -> Iterator[Clip]:
    """The clips of rows; their audio lies behind `marker` in the names of the archive's members."""
    wanted: dict[str, list[Clip]] = {}
    refused = []
    for number, row in rows():
        clip = _member_clip(number, row, column)
        if clip.refused:
            refused.append(clip)
        else:
            wanted.setdefault(clip.id, []).append(clip)
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
