"""Verifies prepared audio during a run, to the last bit.

Opening a prepared split checks everything but the audio, which may be hundreds of gigabytes. A
thread hashes that while the run compiles and starts to train. The cost is in reading, and the run
is about to read the same files.
"""

import threading
from collections.abc import Iterable

from flax_asr import errors
from flax_asr.data import shards

PATIENCE_SECONDS = 10.0
"""Time limit for a file; those of prepared audio have up to 256 MiB."""


class Rereading:
    """Hashes the audio of prepared splits, in a thread that ends with the process or by `close`.

    Args:
        splits: the splits; duplicates are allowed.
    """

    def __init__(self, splits: Iterable[shards.PreparedSplit]) -> None:
        self._splits = {split.folder: split for split in splits}
        self._closing = threading.Event()
        self._found: errors.DataError | None = None
        self._thread = threading.Thread(target=self._read, name="rereading", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `errors.DataError` if a damaged file has been found."""
        if self._found is not None:
            raise self._found

    def wait(self) -> None:
        """Returns when everything has been read and is undamaged.

        Raises:
            errors.DataError: a file is damaged; names the first.
        """
        self._thread.join()
        self.check()

    def close(self) -> None:
        """Stops after the current file, for which it waits, but not for a dead disk."""
        self._closing.set()
        self._thread.join(PATIENCE_SECONDS)

    def _read(self) -> None:
        for split in self._splits.values():
            for name in split.audio_files:
                if self._closing.is_set():
                    return
                try:
                    split.verify(name)
                except errors.DataError as error:
                    self._found = error
                    return
