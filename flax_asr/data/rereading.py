"""Audio read again beside the run: what is on the disk is what was prepared, to the last bit.

Opening a prepared split checks all but the audio, which may be hundreds of gigabytes. A thread
hashes that while the run compiles and begins to train: reading is what costs, and the run is about
to read the same files.
"""

import threading
from collections.abc import Iterable

from flax_asr import errors
from flax_asr.data import shards

PATIENCE_SECONDS = 10.0
"""For a file: those of prepared audio have up to 256 MiB."""


class Rereading:
    """Hashes the audio of prepared splits, in a thread that ends with the process or by `close`.

    Args:
        splits: may name one twice.
    """

    def __init__(self, splits: Iterable[shards.PreparedSplit]) -> None:
        self._splits = {split.folder: split for split in splits}
        self._closing = threading.Event()
        self._found: errors.DataError | None = None
        self._thread = threading.Thread(target=self._read, name="rereading", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `errors.DataError` where a file is known not to be what was written."""
        if self._found is not None:
            raise self._found

    def wait(self) -> None:
        """Returns when all of it was read and is sound.

        Raises:
            errors.DataError: names the first file that is not what was written.
        """
        self._thread.join()
        self.check()

    def close(self) -> None:
        """Reads no further file; waits for the end of the one at hand, but not for a dead disk."""
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
