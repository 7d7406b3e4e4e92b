"""Locks for folders that one process at a time may work in; a lock ends with its process."""

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from flax_asr import errors
from flax_asr.console import terminal

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def alone_in(
    folder: Path, purpose: str, refusal: type[errors.FlaxAsrError], mend: str
) -> Iterator[None]:
    """Creates the folder, and waits until no other process of this machine holds its lock.

    On a disk without locks it does not wait.

    Args:
        folder: the folder, whatever it holds.
        purpose: what the other process does, for the message while waiting.
        refusal: the error if the folder cannot be created.
        mend: what the user can do then.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise refusal(f"{folder} cannot be made: {errors.why(error)}. {mend}.") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            terminal.tell(f"Waiting for another process to {purpose} {folder}", sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)
