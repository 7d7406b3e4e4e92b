"""A release of Common Voice's spontaneous speech.

It has one table for all splits, `ss-corpus-LANGUAGE.tsv`, and its recordings in `audios/`.
"""

import pathlib
import re
from collections.abc import Iterator
from typing import BinaryIO

from flax_asr.sources import clips, tables

RECORDINGS = "audios"
TEXT_COLUMN = "transcription"
_TABLE = re.compile(r"ss-corpus-([A-Za-z][\w-]*)\.tsv")
# Clips that are not validated yet have no split; this is their split in scripted speech.
_UNASSIGNED = "other"


def language_of(file_name: str) -> str | None:
    """The language whose table a file of this name is; None if it is none."""
    found = _TABLE.fullmatch(file_name)
    return found and found[1]


def tables_below(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The table of each language, in a release's folder or the one above several."""
    several = sorted(folder.glob("sps-corpus-*/ss-corpus-*.tsv"))
    oldest_first = sorted(several, key=clips.release_number)
    files = [*oldest_first, *sorted(folder.glob("ss-corpus-*.tsv"))]
    return {found: file for file in files if (found := language_of(file.name))}


def splits(stream: BinaryIO, name: str, column: str) -> dict[str, None]:
    """The splits of a table, in order of appearance.

    Raises:
        errors.DataError: the table cannot be read, or has no rows.
    """
    return dict.fromkeys(_split(row) for _, row in _rows(stream, name, column))


def rows(stream: BinaryIO, name: str, column: str, split: str) -> Iterator[tables.Row]:
    """The rows of a split, with the columns `path` and `sentence` of scripted speech."""
    for number, row in _rows(stream, name, column):
        if _split(row) == split:
            yield number, row | {"path": row["audio_file"], "sentence": row.get(column)}


def _rows(stream: BinaryIO, name: str, column: str) -> Iterator[tables.Row]:
    stream.seek(0)
    return tables.rows(stream, name, ".tsv", ("audio_file", column))


def _split(row: dict[str, object]) -> str:
    return str(row.get("split") or "").strip() or _UNASSIGNED
