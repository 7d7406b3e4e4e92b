"""Text for people, harmless on a terminal whatever is in it.

Transcripts, clip names, speakers' accents and a foreign model's symbols come from strangers. On a
terminal, control characters among them could delete what was written, change the title or answer
for the user, and directional overrides could show a line in another order than it has.
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
    """Makes escapes of characters that a stream's encoding lacks, where it would raise an error."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")


def open_what_was_closed() -> None:
    """Standard streams that the process began without (`2>&-`, some daemons) lead nowhere.

    Python has none then, and the next file that is opened would get the number that other
    libraries write their messages to.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number is this
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def is_unread(stream: Any) -> bool:
    """Whether what reads the stream has gone; what is still written then is lost in silence."""
    try:
        stream.flush()
    except BrokenPipeError:
        _silence(stream)
        return True
    return False


def leave(stream: Any) -> None:
    """Before the process ends: what the stream still cannot take is lost in silence."""
    try:
        stream.flush()
    except OSError:
        _silence(stream)


def _silence(stream: Any) -> None:
    """What is left goes nowhere, or the interpreter's last flush would complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def tell(text: str, stream: io.TextIOBase) -> None:
    """Shows what the work does not depend on.

    A closed terminal, a pipe that nobody reads any more (Ctrl-C ends `| tee` too) and a full disk
    under a log cost the text, not the run.
    """
    with contextlib.suppress(OSError):
        print(plain(text), file=stream, flush=True)


def show(text: str, file: io.TextIOBase | None = None) -> None:
    """Prints a text, by default to standard output, at once.

    Raises:
        ConfigError: it cannot be written, as on a full disk.
        BrokenPipeError: whoever reads has gone.
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
    """Log lines as `plain` has them."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))
