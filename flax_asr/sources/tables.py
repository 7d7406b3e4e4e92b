"""Rows of TSV, CSV and JSON-lines files, read as a stream, with their line numbers.

Common Voice writes TSV without quoting: a `"` is an ordinary character, and "NA" is a sentence. CSV
is quoted as usual. All files must be UTF-8; a byte order mark and Windows line ends are removed.
"""

import csv
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from flax_asr import errors

logger = logging.getLogger(__name__)

Row = tuple[int, dict[str, object]]
# A row of Common Voice has a few hundred bytes.
_MOST_LINE_BYTES = 2**20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# Names of the audio column in other tools.
_AUDIO = frozenset(
    "audio audio_file audio_filepath audio_path file file_name file_path filename filepath path wav"
    " wav_filename Path".split()
)
EXTRA = "\0extra"  # the key of a row's fields past the header's columns


def opened(path: Path) -> BinaryIO:
    """Opens a table for reading.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise errors.DataError(f"{path} cannot be read: {errors.why(error)}.") from error


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends; only "\\n" ends one, so U+2028 stays in its sentence."""
    number = 0
    while raw := stream.readline(_MOST_LINE_BYTES + 1):
        number += 1
        if number == 1:
            if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise errors.DataError(f"{name}: written in UTF-16; save it as UTF-8")
            if b"\r" in raw.rstrip(b"\r\n"):
                raise errors.DataError(
                    f"{name}: its lines end in a carriage return alone, as old Macs wrote them;"
                    " convert the file, for example: tr '\\r' '\\n' < OLD > NEW"
                )
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if len(raw) > _MOST_LINE_BYTES:
            raise errors.DataError(f"{name}, line {number}: longer than 1 MiB; is this a table?")
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise errors.DataError(
                f"{name}, line {number}: not UTF-8 (byte 0x{raw[error.start]:02x} at "
                f"{error.start}); convert the file, for example: iconv -f WINDOWS-1252 -t UTF-8"
            ) from None


def _named(columns: list[str], fields: list[str]) -> dict[str, object]:
    row: dict[str, object] = dict(zip(columns, fields, strict=False))
    if len(fields) > len(columns):
        row[EXTRA] = f"{len(fields)} fields under {len(columns)} columns"
    return row


def _check_columns(columns: list[str], name: str) -> None:
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise errors.DataError(f"{name}: these columns are in the header twice: {twice}")


def _tsv(stream: BinaryIO, name: str) -> Iterator[Row]:
    columns = None
    for number, line in _lines(stream, name):
        fields = line.removesuffix("\n").removesuffix("\r").split("\t")
        if columns is None:
            columns = fields
            _check_columns(columns, name)
            yield 1, dict.fromkeys(columns)
        elif fields != [""]:
            yield number, _named(columns, fields)


def _csv(stream: BinaryIO, name: str) -> Iterator[Row]:
    reader = csv.reader((line for _, line in _lines(stream, name)), strict=True)
    columns = None
    try:
        for fields in reader:
            if columns is None:
                columns = fields
                _check_columns(columns, name)
                yield 1, dict.fromkeys(columns)
            elif fields:
                yield reader.line_num, _named(columns, fields)
    except csv.Error as error:
        raise errors.DataError(f"{name}, line {reader.line_num}: {error}") from None


def _jsonl(stream: BinaryIO, name: str) -> Iterator[Row]:
    first = True
    for number, line in _lines(stream, name):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise errors.DataError(f"{name}, line {number}: not JSON: {error}") from None
        if _SURROGATE.search(line) and not _is_unicode(row):
            raise errors.DataError(f"{name}, line {number}: half of a surrogate pair is not text")
        if not isinstance(row, dict):
            raise errors.DataError(
                f"{name}, line {number}: a {type(row).__name__} where an object is expected, such"
                ' as {"path": "clip.wav", "sentence": "..."}'
            )
        if first:
            yield 1, dict.fromkeys(row)
            first = False
        yield number, row


def _is_unicode(row: object) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


_FORMATS = {".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl}
SUFFIXES = tuple(_FORMATS)


def rows(stream: BinaryIO, name: str, suffix: str, needed: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a table, each with the number of its line.

    Args:
        stream: the bytes of the file.
        name: the file's name, for messages.
        suffix: one of `SUFFIXES`.
        needed: required columns.

    Raises:
        errors.DataError: there is no header, a column is missing or doubled, or encoding or syntax
            are wrong.
    """
    table = _FORMATS[suffix](stream, name)
    _, header = next(table, (0, None))
    if header is None:
        raise errors.DataError(f"{name}: the file is empty")
    need(name, list(header), needed)
    yield from table


class Locales:
    """Warns of the first row whose `locale` is another language.

    Regions count as their language: `en-GB` is `en`. Numbers, which datasets on the hub can have
    instead of names, are ignored.

    Args:
        name: the table's name, for the message.
        language: the language of its clips.
        unit: the unit of row numbers.
    """

    def __init__(self, name: str, language: str, unit: str = "line"):
        self._name, self._language, self._unit = name, language, unit
        self._own = _subtags(language)
        self._warned = False

    def check(self, number: int, row: Mapping[str, Any]) -> None:
        locale = row.get("locale")
        if self._warned or locale in ("", None) or isinstance(locale, int):
            return
        if _subtags(locale)[: len(self._own)] != self._own:
            self._warned = True
            logger.warning(
                "warning: %s, %s %d: the locale is %r, but data.language %r: are these its clips?",
                *(self._name, self._unit, number, locale, self._language),
            )


def of_language(rows: Iterable[Row], name: str, language: str) -> Iterator[Row]:
    """The rows, after checking their `Locales`."""
    locales = Locales(name, language)
    for number, row in rows:
        locales.check(number, row)
        yield number, row


def _subtags(locale: object) -> list[str]:
    return str(locale).strip().lower().replace("_", "-").split("-")


def need(name: str, columns: list[str], needed: tuple[str, ...]) -> None:
    """Refuses a table that lacks a column.

    Args:
        name: the table's name, for messages.
        columns: its columns.
        needed: the column of the audio, then that of the transcript.

    Raises:
        errors.DataError: a column is missing; lists the existing ones, and says what to do.
    """
    missing = [column for column in needed if column not in columns]
    if not missing:
        return
    mend = ""
    if needed[0] in missing:
        there = next((f": rename {column!r}" for column in columns if column in _AUDIO), "")
        mend += f". The column of the audio must have the name {needed[0]!r}{there}"
    if needed[-1] in missing:
        mend += ". If the transcript is in another column, name it with data.text_column"
    if len(columns) == 1 and (mark := re.search("[\t;,|]", columns[0])):
        mend = (
            f". Its columns are separated by {mark[0]!r}: a .tsv has tabs between them, a .csv"
            " commas"
        )
    raise errors.DataError(
        f"{name}: no column {' and no column '.join(map(repr, missing))}; it has "
        f"{', '.join(map(repr, columns))}{mend}"
    )
