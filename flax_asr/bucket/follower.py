"""A run folder in a bucket, on the hosts that do not write there.

The first host keeps its local folder in step with the store; each of the others has a folder of its
own, into which comes what all must read: where the run goes on, and the best checkpoint at its end.
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
    """Brings what the first host has put under the URL.

    Args:
        url: gs://BUCKET/PATH.
        folder: the local run folder of this host.
    """

    def __init__(self, url: str, folder: Path):
        self._store, self._folder = store.Store(url), folder

    def bring(self, step: int | None) -> None:
        """Makes the folder one to read this step from, or to begin in.

        Raises:
            CheckpointError: what the store has of this step is damaged.
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

    # This host writes nothing there: nothing fails, is waited for or is let go.

    def check(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _take_over(self) -> None:
        """Puts aside what this machine has of the time when it was the one that wrote."""
        self._folder.mkdir(parents=True, exist_ok=True)
        named = self._folder / run_folder.LOCK
        if named.is_file() and named.read_bytes():
            run_folder.put_aside(self._folder)
            named.write_bytes(b"")


def fetch_checkpoint(place: store.Store, listed: Iterable[str], folder: Path, step: int) -> None:
    """Brings a checkpoint, whole or not at all.

    Args:
        place: where it is.
        listed: the names of what is there.
        folder: the local run folder.
        step: which one.

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
    """Brings the compiled programs that are not here."""
    names = [name for name in listed if name.startswith(f"{run_folder.COMPILED}/")]
    place.download({name: folder / name for name in names if not (folder / name).exists()})


def newest(folder: Path) -> int | None:
    """The newest checkpoint here whose seal holds."""
    steps = inventory.steps(folder)
    return next((step for step in steps if inventory.is_sound(folder, step)), None)


def seal(step: int) -> str:
    """The name of a checkpoint's seal."""
    return f"{inventory.FOLDER}/{step}/{seals.FILE}"
