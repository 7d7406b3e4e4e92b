"""A run folder in a bucket, on the hosts that do not write there.

The first host mirrors its local folder to the store. Each of the others has its own local folder,
into which it fetches what all must read: the checkpoint to resume from, and the best one at the
end.
"""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from flax_asr import errors, inventory, run_folder, seals
from flax_asr.bucket import store
from flax_asr.record import runlog

logger = logging.getLogger(__name__)


class Follower:
    """Fetches what the first host has put under the URL.

    Args:
        url: gs://BUCKET/PATH.
        folder: the local run folder of this host.
    """

    def __init__(self, url: str, folder: Path):
        self._store, self._folder = store.Store(url), folder

    def bring(self, step: int | None) -> None:
        """Prepares the folder for reading this step, or for a fresh run if it is None.

        Raises:
            CheckpointError: the checkpoint of this step in the store is damaged.
            StoreError: the store cannot be read.
        """
        self._take_over()
        listed = self._store.list()
        fetch_compiled(self._store, listed, self._folder)
        for other in inventory.steps(self._folder):
            if other != step:
                shutil.rmtree(self._folder / inventory.FOLDER / str(other))
        if step is not None:
            self._store.download({runlog.FILE: self._folder / runlog.FILE})
            local = self._folder / seal(step)
            same = local.is_file() and local.read_bytes() == self._store.read(seal(step))
            if not (same and inventory.is_sound(self._folder, step)):
                fetch_checkpoint(self._store, listed, self._folder, step)

    # This host writes nothing, so there is nothing to check, wait for or close.

    def check(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _take_over(self) -> None:
        """Puts aside the folder if it is from a time when this machine was the first host."""
        self._folder.mkdir(parents=True, exist_ok=True)
        named = self._folder / run_folder.LOCK
        if named.is_file() and named.read_bytes():
            run_folder.put_aside(self._folder)
            named.write_bytes(b"")


def fetch_checkpoint(place: store.Store, listed: Iterable[str], folder: Path, step: int) -> None:
    """Fetches a checkpoint, completely or not at all.

    Args:
        place: the store.
        listed: the names of the objects there.
        folder: the local run folder.
        step: the step of the checkpoint.

    Raises:
        CheckpointError: it is damaged.
        StoreError: the store cannot be read.
    """
    begin = f"{inventory.FOLDER}/{step}/"
    unfinished = inventory.unfinished(folder, step)
    shutil.rmtree(unfinished, ignore_errors=True)
    logger.info("fetching the checkpoint of step %d from %s", step, place.url)
    names = [name for name in listed if name.startswith(begin)]
    place.download({name: unfinished / name.removeprefix(begin) for name in names})
    try:
        seals.verify(unfinished)
    except errors.CheckpointError:
        shutil.rmtree(unfinished)
        raise
    there = folder / inventory.FOLDER / str(step)
    shutil.rmtree(there, ignore_errors=True)
    unfinished.rename(there)


def fetch_compiled(place: store.Store, listed: Iterable[str], folder: Path) -> None:
    """Fetches the compiled programs that the folder does not have."""
    names = [name for name in listed if name.startswith(f"{run_folder.COMPILED}/")]
    place.download({name: folder / name for name in names if not (folder / name).exists()})


def newest(folder: Path) -> int | None:
    """The newest checkpoint in the folder that matches its seal."""
    steps = inventory.steps(folder)
    return next((step for step in steps if inventory.is_sound(folder, step)), None)


def seal(step: int) -> str:
    """The name of a checkpoint's seal in the store."""
    return f"{inventory.FOLDER}/{step}/{seals.FILE}"
