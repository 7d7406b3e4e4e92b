"""A run folder met again: what is there, whether this configuration may go on with it.

1. Nothing there: a fresh run.  2. Finished: say so.  3. Unfinished: go on from the newest sound
checkpoint.  4. Another configuration: go on where the change cannot touch the meaning of what was
done, else refuse and name the ways out.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from flax_asr import checkpoint, config, errors, runlog

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
FREE_TO_CHANGE = frozenset(
    "output_dir data.num_workers data.prepared_dir train.logging_steps train.eval_steps"
    " train.save_steps train.save_total_limit train.per_device_train_batch_size"
    " train.per_device_eval_batch_size train.max_bad_updates".split()
)


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Holds the folder against a second run; the system lets go of it when the process ends.

    Raises:
        CheckpointError: another run holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise errors.CheckpointError(
            f"cannot write in output_dir {folder}: {error.strerror}. Give another --output_dir."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise errors.CheckpointError(
                f"another run is at work in {folder}: wait for it, or give another --output_dir."
            ) from error
        yield


def resume_point(folder: Path, asked: config.Config, restart: bool) -> checkpoint.Meta | None:
    """Where to go on, or None for a fresh run.

    Args:
        folder: the run folder.
        asked: the configuration with its global batch size resolved.
        restart: put an old run aside under a dated name.

    Raises:
        ConfigError: the old run was made with another configuration.
        CheckpointError: no checkpoint is sound.
    """
    if restart and (folder / CONFIG).exists():
        put_aside(folder)
    if not (folder / CONFIG).exists():
        return None
    old = config.load(folder / CONFIG)
    changes = differences(old, asked)
    forbidden = {name: change for name, change in changes.items() if not _harmless(name, *change)}
    if forbidden:
        listed = "\n".join(f"  {name}: was {a!r}, now {b!r}" for name, (a, b) in forbidden.items())
        raise errors.ConfigError(
            f"{folder} holds a run with another configuration:\n{listed}\nGive another"
            " --output_dir, or --restart to begin again (the old folder is kept under a dated"
            f" name), or --model.pretrained {folder} in a new folder to start from its weights."
        )
    for name, (a, b) in changes.items():
        logger.info("going on with %s = %r (was %r)", name, b, a)
    step = checkpoint.newest_sound(folder)
    return None if step is None else checkpoint.read_meta(folder, step)


def differences(old: config.Config, new: config.Config) -> dict[str, tuple]:
    """Dotted names of what differs, with both values."""
    before, after = config.flat(old), config.flat(new)
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def _harmless(name: str, old, new) -> bool:
    if name in ("train.num_train_epochs", "train.max_steps"):
        return old is not None and new is not None and new > old
    return name in FREE_TO_CHANGE


def put_aside(folder: Path) -> None:
    """Renames everything of an old run into a dated folder beside it."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    target = folder.with_name(f"{folder.name}-{stamp}")
    target.mkdir()
    for path in folder.iterdir():
        if path.name != ".lock":
            path.rename(target / path.name)
    logger.info("the old run is kept in %s", target)


def is_finished(folder: Path, updates: int, has_test: bool) -> bool:
    """Whether all updates were made, and the test scores, the card and the export are there."""
    if not checkpoint.steps(folder) or checkpoint.steps(folder)[0] < updates:
        return False
    tested = any("test_loss" in event for event in runlog.read(folder) if event["step"] >= updates)
    written = (folder / "README.md").is_file() and (folder / "export" / "config.json").is_file()
    return written and (tested or not has_test)


def resolve(asked: config.Config, device_count: int) -> config.Config:
    """The configuration with its number of clips an update written out.

    Raises:
        ConfigError: the devices cannot share the global batch; names what would fit.
    """
    train = asked.train
    at_once = device_count * train.per_device_train_batch_size
    if train.global_batch_size is None:
        size = at_once * (train.gradient_accumulation_steps or 1)
    elif train.global_batch_size % at_once:
        share, rest = divmod(train.global_batch_size, device_count)
        fitting = [n for n in range(1, share + 1) if rest == 0 and share % n == 0]
        way_out = (
            f"--train.per_device_train_batch_size {' or '.join(map(str, fitting))} would do"
            if fitting
            else f"no per-device batch divides it over {device_count} devices"
        )
        raise errors.ConfigError(
            f"train.global_batch_size {train.global_batch_size} is not {device_count} devices x"
            f" train.per_device_train_batch_size {train.per_device_train_batch_size} x a whole"
            f" number: {way_out}."
        )
    else:
        size = train.global_batch_size
    return dataclasses.replace(
        asked,
        train=dataclasses.replace(train, global_batch_size=size, gradient_accumulation_steps=None),
    )
