"""An existing run folder: what it holds, and whether this configuration may resume it.

1. Empty: a fresh run.  2. Finished: say so.  3. Unfinished: resume from the newest sound
checkpoint.  4. Another configuration: resume if the change leaves the finished updates valid, else
refuse and say what can be done.
"""

import contextlib
import datetime
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from flax_asr import atomic, config, differences, early_stopping, errors, inventory
from flax_asr.record import curves, left_out, runlog

logger = logging.getLogger(__name__)

CONFIG, CARD, EXPORT = "config.yaml", "README.md", "export"
COMPILED = "compilation_cache"
LOCK, FINISHED = ".lock", ".finished"
_WRITTEN = frozenset(
    (
        *(CONFIG, CARD, EXPORT, COMPILED, FINISHED),
        *(inventory.FOLDER, runlog.FILE, runlog.BOARD, curves.FILE, left_out.FILE),
    )
)
_HALF = (atomic.UNFINISHED, ".old")
"""Suffixes of hidden names: unfinished files, and an export that was being replaced."""


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Locks the folder against a second run; the lock ends with the process.

    Raises:
        CheckpointError: another run holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise errors.CheckpointError(
            f"cannot write in output_dir {folder}: {errors.why(error)}. Give another --output_dir."
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise errors.CheckpointError(
                f"another run is at work in {folder}: wait for it, or give another --output_dir."
            ) from error
        except OSError:
            logger.warning("%s cannot be locked: see that only one run writes there.", folder)
        yield
    finally:
        os.close(lock)


def resume_point(folder: Path, asked: config.Config, restart: bool) -> inventory.Meta | None:
    """The checkpoint to resume from, or None for a fresh run.

    Before the first checkpoint any configuration is accepted, as there is nothing to lose.

    Args:
        folder: the run folder.
        asked: the configuration with its global batch size resolved.
        restart: put an old run aside under a dated name.

    Raises:
        ConfigError: the old run was made with another configuration.
        CheckpointError: no checkpoint is sound, or a fresh run would overwrite something.
    """
    if restart and _holds_a_run(folder):
        put_aside(folder, _is_written_by_a_run)
    if not inventory.steps(folder):
        _refuse_to_overwrite(folder)
        return None
    if not (folder / CONFIG).is_file():
        raise errors.CheckpointError(
            f"{folder} holds checkpoints but no {CONFIG}: give another --output_dir, or --restart"
            " to begin again (what is there is kept under a dated name)."
        )
    changes = differences.between(config.load(folder / CONFIG), asked)
    differences.check(asked.output_dir, changes)
    step = inventory.newest_sound(folder)
    for name, (was, now) in changes.items():
        logger.info("going on with %s %r (was %r)", name, now, was)
    return inventory.read_meta(folder, step)


def _holds_a_run(folder: Path) -> bool:
    return bool(inventory.steps(folder)) or (folder / runlog.FILE).is_file() or _is_ours(folder)


def _is_ours(folder: Path) -> bool:
    """Whether config.yaml was written by a run: complete, and without comments."""
    try:
        return (folder / CONFIG).read_bytes() == config.dump(config.load(folder / CONFIG)).encode()
    except (OSError, errors.ConfigError):
        return False


def _refuse_to_overwrite(folder: Path) -> None:
    """Refuses a folder with results but no checkpoint, which a run would overwrite."""
    at_risk = [name for name in (CARD, EXPORT, CONFIG) if (folder / name).exists()]
    if at_risk == [CONFIG] and _is_ours(folder):
        return
    if at_risk and _holds_a_run(folder):
        raise errors.CheckpointError(
            f"{folder} holds {' and '.join(at_risk)} of a run but no checkpoints: give another"
            " --output_dir, or --restart to begin again (what the run wrote is kept under a dated"
            " name)."
        )
    if at_risk:
        raise errors.CheckpointError(
            f"output_dir {folder} holds {' and '.join(at_risk)}, which no run wrote and this one"
            " would overwrite: give another --output_dir, or move it."
        )


def put_aside(folder: Path, which: Callable[[str], bool] = lambda name: True) -> None:
    """Moves an old run into a dated folder beside it, the configuration last.

    Args:
        folder: the run folder.
        which: selects the names to move; by default all but the lock.

    Raises:
        CheckpointError: the dated folder cannot be created or written.
    """
    old = [path for path in folder.iterdir() if path.name != LOCK and which(path.name)]
    if not old:
        return
    # Beside the folder itself, as a link to it may be on another disk.
    there = folder.resolve()
    target = there.parent / dated(there.name)
    try:
        target.mkdir()
        # Checkpoints go first: after a kill they must not pass for those of the new run.
        for path in sorted(old, key=lambda p: (p.name == CONFIG, p.name != inventory.FOLDER)):
            path.rename(target / path.name)
    except OSError as error:
        with contextlib.suppress(OSError):
            target.rmdir()  # if nothing is in it
        raise errors.CheckpointError(
            f"the old run in {folder} cannot be moved to {target}: {errors.why(error)}. Move it"
            " yourself, or give another --output_dir."
        ) from error
    logger.info("the old run is kept in %s", target)


def _is_written_by_a_run(name: str) -> bool:
    return (
        name in _WRITTEN
        or name.startswith(("predictions-", "left_out-"))
        or (name.startswith(".") and name.endswith(_HALF))
    )


def dated(name: str) -> str:
    """The dated name for an old run."""
    return f"{name}-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S-%f')}"


def sweep(folder: Path) -> None:
    """Removes unfinished files of a killed run."""
    for path in folder.glob(".*"):
        if path.suffix in _HALF:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def record(folder: Path, cfg: config.Config) -> None:
    """Writes config.yaml, atomically."""
    try:
        with atomic.replacing(folder / CONFIG) as unfinished:
            config.save(cfg, unfinished)
    except OSError as error:
        raise errors.CheckpointError(
            f"cannot write {folder / CONFIG}: {errors.why(error)}."
        ) from error


def mark_finished(folder: Path, step: int) -> None:
    """Marks test scores, card and export as those of the run after `step`."""
    with atomic.replacing(folder / FINISHED) as unfinished:
        unfinished.write_text(f"{step}\n", encoding="utf-8")


def is_finished(folder: Path, past: inventory.Meta, asked: config.Config) -> bool:
    """Whether nothing is left to do: all updates are done, and card and export are up to date."""
    before, after = config.flat(inventory.meta_config(past)), config.flat(asked)
    longer = any(before[name] != after[name] for name in differences.LENGTHS)
    unfinished = longer or past.step < past.facts["updates"]
    if unfinished and not early_stopping.is_due(runlog.read(folder), asked.train):
        return False
    marked = folder / FINISHED
    written = (folder / CARD).is_file() and (folder / EXPORT / "config.json").is_file()
    return written and marked.is_file() and marked.read_bytes().strip() == b"%d" % past.step
