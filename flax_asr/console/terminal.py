"""Text output that is safe on a terminal, whatever it contains.

Transcripts, clip names, speakers' accents and a foreign model's symbols are untrusted. On a
terminal their control characters could delete text, change the title or send input for the user,
and directional overrides could show a line in another order.
"""

import contextlib
import io
import logging
import os
import re
import sys
from typing import Any

from flax_asr import errors

# Control characters but tab and new line, line separators, directional embeddings, overrides and
# isolates, and halves of surrogate pairs, which no encoding can write. Source: Unicode Standard
# Annex 9, table 2.1; ECMA-48. Marks and joiners that ordinary text needs stay.
_HARMFUL = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(text: str) -> str:
    """The text with harmful characters as escapes: `\\x1b` for ESC."""
    return _HARMFUL.sub(lambda found: ascii(found[0])[1:-1], text)


def write_what_can_be_written(*streams: Any) -> None:
    """Makes streams escape characters that their encoding lacks, instead of raising an error."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")


def open_what_was_closed() -> None:
    """Opens /dev/null for standard streams that were closed at start (`2>&-`, some daemons).

    Python sets them to None, and the next file to be opened would get their number, to which other
    libraries write messages.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(
                os.open(os.devnull, os.O_RDWR), True
            )  # gets the lowest free number, this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def is_unread(stream: Any) -> bool:
    """Whether the reader of the stream is gone; if so, later output is discarded silently."""
    try:
        stream.flush()
    except BrokenPipeError:
        _silence(stream)
        return True
    return False


def leave(stream: Any) -> None:
    """Flushes a stream before the process ends; output that cannot be written is discarded."""
    try:
        stream.flush()
    except OSError:
        _silence(stream)


def _silence(stream: Any) -> None:
    """Discards what is left, about which the interpreter's last flush would complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def tell(text: str, stream: io.TextIOBase) -> None:
    """Writes text whose loss does not matter.

    A closed terminal, a pipe without a reader (Ctrl-C ends `| tee` too) or a full disk costs the
    text, not the run.
    """
    with contextlib.suppress(OSError):
        print(plain(text), file=stream, flush=True)


def show(text: str, file: io.TextIOBase | None = None) -> None:
    """Prints a text immediately, by default to standard output.

    Raises:
        ConfigError: it cannot be written, for example on a full disk.
        BrokenPipeError: the reader is gone.
    """
    try:
        print(plain(text), file=file, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise errors.ConfigError(
            f"the output cannot be written: {errors.why(error)}. Send it elsewhere (`> FILE`)."
        ) from error


class Formatter(logging.Formatter):
    """Formats log lines, with harmful characters escaped by `plain`."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))
