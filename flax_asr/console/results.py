"""Results for programs: one JSON object a line, into a file or to standard output."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flax_asr import errors

Write = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def writer(json_file: str | None) -> Iterator[Write]:
    """What `--json FILE` asks for: "-" is standard output, None is nowhere.

    Each object is written at once: what is done stays if a long job is stopped.

    Raises:
        ConfigError: the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if json_file is None:
            yield lambda result: None
            return
        if json_file == "-":
            file = sys.stdout
        else:
            try:
                file = stack.enter_context(Path(json_file).open("w", encoding="utf-8"))
            except OSError as error:
                raise errors.ConfigError(
                    f"--json {json_file} cannot be written: {error.strerror}."
                ) from error

        def write(result: Mapping[str, Any]) -> None:
            file.write(_line(result, file.encoding or "utf-8"))
            file.flush()

        yield write


def _line(result: Mapping[str, Any], encoding: str) -> str:
    """The object on a line; with escapes where the encoding lacks a character of it.

    So it is with standard output in an old locale, and with file names that are no UTF-8.
    """
    line = json.dumps(result, ensure_ascii=False) + "\n"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        line = json.dumps(result) + "\n"
    return line


def people(json_file: str | None) -> io.TextIOBase:
    """Where text for people goes: standard error where standard output is for programs."""
    return sys.stderr if json_file == "-" else sys.stdout
