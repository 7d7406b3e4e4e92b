"""A Common Voice release as downloaded, a .tar.gz, read without unpacking it to disk."""

import contextlib
import dataclasses
import functools
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

from flax_asr import errors
from flax_asr.sources import archives, clips, scripted, spontaneous, tables


def source(path: pathlib.Path, language: str, text_column: str | None) -> clips.Source:
    """The release in this archive, which is read once here and once more for every split read.

    A .tar.gz can only be read from its start. The tables are kept in temporary files, the clips
    come in the archive's order, and no clip is unpacked to disk.

    Args:
        path: the archive.
        language: the language to read.
        text_column: the column of the transcript; None for the usual one.

    Raises:
        errors.DataError: it cannot be read, or does not hold the language.
    """
    found = _tables(path)
    with found.spools as spools:
        # The archives of the first releases had no folder for the language.
        folder = language if language in found.scripted or language in found.spontaneous else ""
        if folder in found.scripted:
            readers = _scripted(path, folder, found.scripted[folder], text_column, language)
        elif language in found.spontaneous:
            readers = _spontaneous(path, found.spontaneous[language], text_column)
        else:
            held = ", ".join(map(repr, sorted({*found.scripted, *found.spontaneous})))
            raise errors.DataError(f"{path}: an archive without {language!r}; it has {held}")
        corpus = clips.Source(str(path), clips.release_name(found.release), readers)
        weakref.finalize(corpus, spools.pop_all().close)
    return corpus


@dataclasses.dataclass(frozen=True)
class _Tables:
    """The tables of an archive, each in a temporary file.

    Attributes:
        release: the path from which the name of the release is read.
        scripted: the tables by folder ("" if there is none) and split.
        spontaneous: the single table of each language.
        spools: closes the files.
    """

    release: pathlib.Path
    scripted: dict[str, dict[str, BinaryIO]]
    spontaneous: dict[str, BinaryIO]
    spools: contextlib.ExitStack


def _tables(path: pathlib.Path) -> _Tables:
    release, by_folder, by_language = path, {}, {}
    with contextlib.ExitStack() as spools:
        for name, _, body in archives.members(path):
            parts = pathlib.PurePosixPath(name).parts
            if not name.endswith(".tsv") or not clips.is_inside(name):
                continue
            split = parts[-1].removesuffix(".tsv")
            language = spontaneous.language_of(parts[-1])
            if language is None and not scripted.is_split(split):
                continue
            if parts[0].startswith(("cv-corpus-", "sps-corpus-")):
                release = pathlib.Path(parts[0])
            spool = spools.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(body, spool)
            if language is not None:
                by_language[language] = spool
            else:
                by_folder.setdefault("/".join(parts[-2:-1]), {})[split] = spool
        if not by_folder and not by_language:
            raise errors.DataError(f"{path}: no language folder with .tsv tables in this archive")
        return _Tables(release, by_folder, by_language, spools.pop_all())


def _scripted(
    path: pathlib.Path,
    folder: str,
    spools: Mapping[str, BinaryIO],
    text_column: str | None,
    language: str,
) -> dict[str, Callable[[], Iterator[clips.Clip]]]:
    column = text_column or scripted.TEXT_COLUMN

    def rows(split: str) -> Iterator[tables.Row]:
        spools[split].seek(0)
        return scripted.rows(spools[split], f"{path}: {split}.tsv", column, language)

    recordings = f"/{scripted.RECORDINGS}/"
    marker = f"/{folder}{recordings}" if folder else recordings
    return {
        split: functools.partial(_clips, path, functools.partial(rows, split), marker, column)
        for split in spools
    }


def _spontaneous(
    path: pathlib.Path, spool: BinaryIO, text_column: str | None
) -> dict[str, Callable[[], Iterator[clips.Clip]]]:
    table = (spool, str(path), text_column or spontaneous.TEXT_COLUMN)
    marker = f"/{spontaneous.RECORDINGS}/"
    return {
        split: functools.partial(
            _clips,
            path,
            functools.partial(spontaneous.rows, *table, split),
            marker,
            scripted.TEXT_COLUMN,
        )
        for split in spontaneous.splits(*table)
    }


def _clips(
    path: pathlib.Path, rows: Callable[[], Iterator[tables.Row]], marker: str, column: str
) -> Iterator[clips.Clip]:
    """The clips of rows; the name of a clip follows `marker` in that of its archive member."""
    wanted: dict[str, list[clips.Clip]] = {}
    refused = []
    for number, row in rows():
        clip = clips.of_release(number, row, column)
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
                why = f"{size} bytes are too many for a clip"
                refused.extend(dataclasses.replace(clip, refused=why) for clip in same)
            else:
                content = body.read()
                yield from (dataclasses.replace(clip, audio_bytes=content) for clip in same)
            if not wanted:
                break
    for same in wanted.values():
        refused.extend(dataclasses.replace(clip, refused="not in the archive") for clip in same)
    yield from refused
