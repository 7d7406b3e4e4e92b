"""Local copies of models in a bucket: a run's checkpoint, an export, or another model folder.

Copies are kept, separate from those that runs work in, and only changed files are fetched again.
"""

import contextlib
import logging
import re
import shutil
import time
from pathlib import Path

from flax_asr import atomic, errors, inventory, locks, run_folder, seals
from flax_asr.bucket import store

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(rf"(.+)/{inventory.FOLDER}/(\d+)/?")
_LEFT_SECONDS = 24 * 3600.0
"""An unfinished file that has not been written to for so long is abandoned."""
_SEAL = re.compile(rf"{inventory.FOLDER}/(\d+)/{re.escape(seals.FILE)}")


def model(url: str, step: int | None = None) -> Path:
    """Copies what a URL names, and returns the local folder.

    Args:
        url: a run, `RUN/checkpoints/STEP`, or another model folder.
        step: which checkpoint of a run; by default the best one. The others are not copied.

    Raises:
        ModelError: there is nothing at the URL.
        StoreError: the store cannot be read, or the copy cannot be written.
    """
    match = _CHECKPOINT.fullmatch(url)
    if match is not None:
        return model(match[1], int(match[2])) / inventory.FOLDER / match[2]
    place, folder = store.Store(url), store.local_folder(url, kind="models")
    listed = place.list()
    if not listed:
        raise errors.ModelError(f"there is nothing in {place.url}: name a run or a model folder.")
    sealed = sorted(int(found[1]) for found in map(_SEAL.fullmatch, listed) if found)
    mend = "Fix that, or set XDG_CACHE_HOME to a folder that can be written"
    with locks.alone_in(folder, "copy a model to", errors.StoreError, mend):
        _remove_left(folder)
        logger.info("copying what is needed of %s to %s", place.url, folder)
        if run_folder.CONFIG in listed and sealed:
            _copy_run(place, listed, folder, sealed, step)
        else:
            _copy_all(place, listed, folder)
    return folder


def pretrained(url: str) -> Path:
    """Copies weights to start from, of a finished run its export; returns the local folder."""
    export = f"{url.rstrip('/')}/{run_folder.EXPORT}"
    return model(export if store.Store(export).list() else url)


def _copy_all(place: store.Store, listed: dict[str, store.Entry], folder: Path) -> None:
    for path in folder.rglob("*"):
        stays = path.relative_to(folder).as_posix() in listed or _is_unfinished(path)
        if path.is_file() and not stays:
            path.unlink(missing_ok=True)
    place.download({n: folder / n for n, e in listed.items() if not e.same_as(folder / n)})


def _is_unfinished(path: Path) -> bool:
    return path.name.endswith(atomic.UNFINISHED)


def _remove_left(folder: Path) -> None:
    """Removes unfinished files of killed processes.

    Recent ones may still be written, as the lock covers only this machine, and the home folder may
    be shared by several.
    """
    for path in filter(_is_unfinished, folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _LEFT_SECONDS:
                path.unlink()


def _copy_run(
    place: store.Store,
    listed: dict[str, store.Entry],
    folder: Path,
    sealed: list[int],
    step: int | None,
) -> None:
    """Copies the configuration, the metadata of all checkpoints, and the wanted checkpoint."""
    for stale in set(inventory.steps(folder)) - set(sealed):
        shutil.rmtree(folder / inventory.FOLDER / str(stale))
    small = [run_folder.CONFIG]
    small += [_name(s, file) for s in sealed for file in (seals.FILE, inventory.META)]
    place.download({name: folder / name for name in small})
    scores = inventory.scores(folder)
    wanted = inventory.by_merit(scores) if step is None else [s for s in sealed if s == step]
    for candidate in wanted:
        if inventory.is_sound(folder, candidate):
            return
        names = [name for name in listed if name.startswith(_name(candidate, ""))]
        place.download({name: folder / name for name in names})
        if inventory.is_sound(folder, candidate):
            return
        logger.warning("the checkpoint of step %d in %s is damaged", candidate, place.url)


def _name(step: int, file: str) -> str:
    return f"{inventory.FOLDER}/{step}/{file}"
