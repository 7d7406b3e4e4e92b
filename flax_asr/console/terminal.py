"""Text for people, harmless on a terminal whatever is in it.

Transcripts, clip names, speakers' accents and a foreign model's symbols come from strangers. On a
terminal, control characters among them could delete what was written, change the title or answer
for the user, and directional overrides could show a line in another order than it has.
"""

import io
import logging
import os
import re
from typing import Any

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


def is_unread(stream: Any) -> bool:
    """Whether what reads the stream has gone; what is still written then is lost in silence."""
    try:
        stream.flush()
    except BrokenPipeError:
        # Or the interpreter's last flush would complain.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return True
    return False


def show(text: str, file: io.TextIOBase | None = None) -> None:
    """Prints a text, by default to standard output, at once."""
    print(plain(text), file=file, flush=True)


class Formatter(logging.Formatter):
    """Log lines as `plain` has them."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))
