"""Files that are written whole or not at all, whatever ends the process or the machine."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".unfinished"
"""The suffix, with a dot before the name, of what is being written; a kill may leave it behind."""

# Some file systems of a network know no such thing, and not every folder may be read.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES)


def unfinished(path: Path, *, shared: bool = False) -> Path:
    """Where a file or folder is until it is whole: a hidden name in the same folder.

    Args:
        path: the name it will have.
        shared: nothing keeps a second process from writing it too: the name is this call's own.
            Else the next writer takes the place of what a kill left.
    """
    own = f".{uuid.uuid4().hex[:8]}" if shared else ""
    return path.with_name(f".{path.name}{own}{UNFINISHED}")


@contextlib.contextmanager
def replacing(path: Path, *, shared: bool = False, lasting: bool = True) -> Iterator[Path]:
    """An empty file to fill, which takes the name `path` when the block ends well, else goes.

    The name is given in one step of the file system: who reads sees the old file or the new one.

    Args:
        path: the name; what is there is replaced.
        shared: as for `unfinished`.
        lasting: the content is on the disk before it has its name, and the name when this ends: a
            machine that is taken away takes what the system has not yet written. Not worth the
            time where the file is verified before use, and can be had again.

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
            place.chmod(mode)  # safetensors gives its files to their owner alone
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
    """Returns when what was written to a file is on the disk.

    Raises:
        OSError: it could not be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """The same for the names in a folder, where the file system can.

    Raises:
        OSError: they could not be written.
    """
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
