"""Results for programs: one JSON object a line, into a file or to standard output."""

import contextlib
import functools
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flax_asr import errors, json_object

Write = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def writer(json_file: str | None) -> Iterator[Write]:
    """A function that writes results to `--json FILE`: "-" is standard output, None is nowhere.

    Each object is written immediately, so that results are kept if a long job is stopped.

    Raises:
        ConfigError: the file cannot be written; `write` raises it too.
    """
    with contextlib.ExitStack() as stack:
        if json_file is None:
            yield lambda result: None
            return
        if json_file == "-":
            put, encoding = _print, sys.stdout.encoding or "utf-8"
        else:
            try:
                file = stack.enter_context(Path(json_file).open("wb", buffering=0))
            except OSError as error:
                raise _unwritable(json_file, error) from error
            put, encoding = functools.partial(_append, file), "utf-8"

        def write(result: Mapping[str, Any]) -> None:
            try:
                put(_line(result, encoding))
            except BrokenPipeError:
                raise  # the reader is gone
            except OSError as error:
                raise _unwritable(json_file, error) from error

        yield write


def _unwritable(json_file: str, error: OSError) -> errors.ConfigError:
    return errors.ConfigError(f"--json {json_file} cannot be written: {errors.why(error)}.")


def _print(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


def _append(file: io.FileIO, line: str) -> None:
    """Writes without a buffer, which on a full disk would fail again when closed."""
    left = line.encode("utf-8")
    while left:
        left = left[file.write(left) :]


def _line(result: Mapping[str, Any], encoding: str) -> str:
    """The object as a line; with escapes if the encoding lacks one of its characters.

    That happens with standard output in an old locale, and with file names that are not UTF-8.
    """
    result = json_object.readable(result)
    line = json.dumps(result, ensure_ascii=False) + "\n"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        line = json.dumps(result) + "\n"
    return line


def people(json_file: str | None) -> io.TextIOBase:
    """The stream for text: standard error if standard output is used for `--json`."""
    return sys.stderr if json_file == "-" else sys.stdout
