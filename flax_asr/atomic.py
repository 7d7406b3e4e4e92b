"""Files that are written completely or not at all, even if the process or machine dies."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".unfinished"
"""Suffix of hidden files that are being written; a killed process may leave one behind."""

# Errors of network file systems that cannot sync, and of folders that may not be read.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES)


def unfinished(path: Path, *, shared: bool = False) -> Path:
    """The temporary path of a file or folder while it is written: a hidden name in the same folder.

    Args:
        path: its final path.
        shared: whether a second process may write it too: then the name is unique to this call.
            Otherwise the next writer overwrites what a killed process left.
    """
    own = f".{uuid.uuid4().hex[:8]}" if shared else ""
    return path.with_name(f".{path.name}{own}{UNFINISHED}")


@contextlib.contextmanager
def replacing(path: Path, *, shared: bool = False, lasting: bool = True) -> Iterator[Path]:
    """A temporary file that is renamed to `path` if the block succeeds, and removed otherwise.

    The rename is atomic: a reader sees either the old file or the new one.

    Args:
        path: the final path; an existing file is replaced.
        shared: as for `unfinished`.
        lasting: sync the content to disk before the rename, and the rename before returning, so
            that both survive the machine. Not worth the time for a file that is verified before
            use and can be recreated.

    Raises:
        OSError: it cannot be written.
    """
    place = unfinished(path, shared=shared)
    try:
        place.unlink(missing_ok=True)
        place.touch()
        mode = place.stat().st_mode
        yield place
        if place.stat().st_mode != mode:
            place.chmod(mode)  # safetensors makes its files readable by their owner only
        if lasting:
            sync(place)
        place.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            place.unlink()
        raise
    if lasting:
        sync_folder(path.parent)


def sync(path: Path) -> None:
    """Syncs a file's content to disk.

    Raises:
        OSError: it could not be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Syncs the names in a folder to disk, if the file system can.

    Raises:
        OSError: they could not be written.
    """
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
