"""A Common Voice release of scripted speech.

It holds a table for each split, `SPLIT.tsv`, and the recordings of all of them in `clips/`.
"""

import pathlib
from collections.abc import Iterator
from typing import BinaryIO

from flax_asr.sources import clips, tables

RECORDINGS = "clips"
TEXT_COLUMN = "sentence"
# Tables of a release that are not splits.
_NO_SPLITS = ("reported", "clip_durations", "validated_sentences", "unvalidated_sentences")


def is_split(name: str) -> bool:
    """Whether the table with this name, without `.tsv`, is a split."""
    return name not in _NO_SPLITS and not name.startswith((".", "ss-corpus-", "ss-reported-"))


def tables_of(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The table of each split, in a language's folder."""
    return {file.stem: file for file in sorted(folder.glob("*.tsv")) if is_split(file.stem)}


def folders_of(release: pathlib.Path, language: str) -> list[pathlib.Path]:
    """Where the tables can be: here, below, or below one of several releases, newest first."""
    several = sorted(release.glob(f"cv-corpus-*/{language}"))
    newest_first = sorted(several, key=clips.release_number, reverse=True)
    return [release, release / language, *newest_first]


def rows(stream: BinaryIO, name: str, column: str, language: str) -> Iterator[tables.Row]:
    """The rows of a table; `name` is for messages.

    Raises:
        errors.DataError: the table cannot be read, or lacks a column.
    """
    # A folder or archive that holds tables itself is read whatever its name.
    found = tables.rows(stream, name, ".tsv", ("path", column))
    return tables.of_language(found, name, language)
