"""A table of clips with the columns `path` and `sentence`, and `split` if there are several.

Without a column `split`, all clips are in train.
"""

import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Set
from typing import Any

from flax_asr import errors
from flax_asr.sources import clips, tables

# Columns with the start of a row in its recording, or of the clip in what it was cut from.
_STARTS = "offset start start_time begin begin_time".split()


def source(path: pathlib.Path, column: str, language: str) -> clips.Source:
    """The clips of a table: .csv, .tsv or .jsonl.

    Args:
        path: the table's path; relative paths in it start from its folder.
        column: the column of the transcript.
        language: its language; a column `locale` with another one causes a warning.

    Raises:
        errors.DataError: it cannot be read, lacks a column, or has splits in some lines only.
    """
    splits: dict[str | None, None] = {}
    starts: dict[str, object] = {}
    cut = set()
    for number, row in tables.of_language(_rows(path, column), str(path), language):
        name, start = row.get("path"), next((row[key] for key in _STARTS if key in row), None)
        if isinstance(name, str) and start is not None and starts.setdefault(name, start) != start:
            cut.add(name)
        split = _split_of(row)
        # A short line, or an object without the key, would belong to every split.
        if split in ("", None) and ("split" in row or splits.keys() - {None}):
            raise errors.DataError(f"{path}, line {number}: the column split is empty")
        if split is not None and None in splits:
            raise errors.DataError(f"{path}, line {number}: has a split, but no line before it")
        splits[split] = None
    if not splits:
        raise errors.DataError(f"{path}: a header and no clips")
    readers = {
        split or "train": functools.partial(_clips, path, split, column, frozenset(cut))
        for split in splits
    }
    return clips.Source(str(path), path.stem, readers)


def _split_of(row: Mapping[str, Any]) -> str | None:
    split = row.get("split")
    return None if split is None else str(split).strip()


def _rows(path: pathlib.Path, column: str) -> Iterator[tables.Row]:
    with tables.opened(path) as stream:
        yield from tables.rows(stream, str(path), path.suffix.lower(), ("path", column))


def _clips(
    path: pathlib.Path, split: str | None, column: str, cut: Set[str]
) -> Iterator[clips.Clip]:
    for number, row in _rows(path, column):
        if split is not None and _split_of(row) != split:
            continue
        if why := _refusal(row, cut):
            yield clips.from_row(row, f"line {number}", column, refused=why)
        else:
            name = row["path"]
            audio = str(path.parent / os.path.expanduser(name))
            yield clips.from_row(row, name, column, audio=audio)


def _refusal(row: Mapping[str, Any], cut: Set[str]) -> str:
    """Why a row cannot be a clip, or ""; `cut` are recordings with rows for several parts."""
    name = row.get("path")
    if row.get("offset") not in (None, "", 0, "0", "0.0"):
        return f"it begins {row['offset']} s into its recording; cut such clips out first"
    if not isinstance(name, str) or not name or "\0" in name:
        return "the row has no path"
    if name in cut:
        return f"{name} has rows that begin elsewhere in it; cut such clips out first"
    return ""
