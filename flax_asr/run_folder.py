"""A run folder met again: what is there, whether this configuration may go on with it.

1. Nothing there: a fresh run.  2. Finished: say so.  3. Unfinished: go on from the newest sound
checkpoint.  4. Another configuration: go on where the change cannot touch the meaning of what was
done, else refuse and name the ways out.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax_asr
from flax_asr import atomic, config, errors, inventory
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
"""Suffixes of hidden names: what was being written, and an export that was being replaced."""

FREE_TO_CHANGE = frozenset(
    "output_dir data.source data.num_workers data.prepared_dir data.cache_features model.attention"
    " model.remat_policy train.gradient_checkpointing train.logging_steps train.eval_steps"
    " train.save_steps train.save_total_limit train.per_device_train_batch_size"
    " train.per_device_eval_batch_size train.early_stopping_patience train.max_bad_updates"
    " train.on_save_error train.zero_sharding".split()
)
"""Where and how fast to train, not what. `check_data` compares the clips of a source that moved."""

LENGTHS = ("train.max_steps", "train.num_train_epochs")

UNSET = "not set"
"""Stands for what a mapping such as model.config does not have."""


OWN_TO_A_HOST = frozenset(
    "output_dir data.source data.prepared_dir data.num_workers model.pretrained"
    " text.vocabulary".split()
)
"""Paths, which may differ between hosts: what lies there is compared instead."""


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Holds the folder against a second run; the system lets go of it when the process ends.

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
    """Where to go on, or None for a fresh run.

    Before the first checkpoint nothing is done that another configuration could spoil.

    Args:
        folder: the run folder.
        asked: the configuration with its global batch size resolved.
        restart: put an old run aside under a dated name.

    Raises:
        ConfigError: the old run was made with another configuration.
        CheckpointError: no checkpoint is sound, or a fresh run would write over something.
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
    changes = differences(config.load(folder / CONFIG), asked)
    _refuse_meaningful(asked.output_dir, changes)
    step = inventory.newest_sound(folder)
    for name, (a, b) in changes.items():
        logger.info("going on with %s %r (was %r)", name, b, a)
    return inventory.read_meta(folder, step)


def _holds_a_run(folder: Path) -> bool:
    return bool(inventory.steps(folder)) or (folder / runlog.FILE).is_file() or _is_ours(folder)


def _is_ours(folder: Path) -> bool:
    """Whether config.yaml there is one that a run wrote: complete, and without a comment."""
    try:
        return (folder / CONFIG).read_bytes() == config.dump(config.load(folder / CONFIG)).encode()
    except (OSError, errors.ConfigError):
        return False


def _refuse_to_overwrite(folder: Path) -> None:
    """Before the first checkpoint a run has written a configuration and a log, and no result."""
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
            " would write over: give another --output_dir, or move it."
        )


def same_on_all_hosts(cfg: config.Config) -> dict[str, Any]:
    """What hosts that train together must have in common before they begin."""
    settings = {n: v for n, v in config.flat(cfg).items() if n not in OWN_TO_A_HOST}
    versions = {"flax_asr": flax_asr.__version__, "jax": importlib.metadata.version("jax")}
    return settings | versions


def differences(old: config.Config, new: config.Config) -> dict[str, tuple[Any, Any]]:
    """Dotted names of what differs, with both values."""
    before, after = _every_name(old), _every_name(new)
    pairs = {name: (before.get(name, UNSET), after.get(name, UNSET)) for name in before | after}
    return {name: (was, now) for name, (was, now) in pairs.items() if was != now}


def _every_name(cfg: config.Config) -> dict[str, Any]:
    """Every option by its dotted name, those inside of a mapping such as model.config too."""
    named: dict[str, Any] = {}
    for name, value in config.flat(cfg).items():
        if isinstance(value, dict):
            named |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            named[name] = value
    return named


def _refuse_meaningful(folder: str, changes: Mapping[str, tuple[Any, Any]]) -> None:
    refused = {
        name: (old, new)
        for name, (old, new) in changes.items()
        if name not in FREE_TO_CHANGE and not _longer(name, old, new)
    }
    if refused:
        listed = "\n".join(
            f"  {name}: was {old!r}, now {new!r}" for name, (old, new) in refused.items()
        )
        raise errors.ConfigError(
            f"{folder} holds a run with another configuration:\n{listed}\nGive another"
            " --output_dir, or --restart to begin again (the old run is kept under a dated"
            f" name), or --model.pretrained {folder} with another --output_dir to start from its"
            " weights."
        )


def _longer(name: str, old: Any, new: Any) -> bool:
    return name in LENGTHS and old is not None and new is not None and new > old


def put_aside(folder: Path, which: Callable[[str], bool] = lambda name: True) -> None:
    """Moves an old run into a dated folder beside it, the configuration last.

    Args:
        folder: its folder.
        which: the names that are moved; by default all but the lock's.

    Raises:
        CheckpointError: nothing can be made beside the folder, or nothing moved there.
    """
    old = [path for path in folder.iterdir() if path.name != LOCK and which(path.name)]
    if not old:
        return
    # Beside the folder itself: a link to it may lie on another disk.
    there = folder.resolve()
    target = there.parent / dated(there.name)
    try:
        target.mkdir()
        # A kill in between must not leave checkpoints that look like those of the new run.
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
    """The name under which an old run is kept."""
    return f"{name}-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S-%f')}"


def sweep(folder: Path) -> None:
    """Removes what a kill left half written."""
    for path in folder.glob(".*"):
        if path.suffix in _HALF:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def record(folder: Path, cfg: config.Config) -> None:
    """Writes config.yaml, whole or not at all."""
    try:
        with atomic.replacing(folder / CONFIG) as unfinished:
            config.save(cfg, unfinished)
    except OSError as error:
        raise errors.CheckpointError(
            f"cannot write {folder / CONFIG}: {errors.why(error)}."
        ) from error


def mark_finished(folder: Path, step: int) -> None:
    """Notes that test scores, card and export belong to the run as it is after `step`."""
    with atomic.replacing(folder / FINISHED) as unfinished:
        unfinished.write_text(f"{step}\n", encoding="utf-8")


def is_finished(folder: Path, past: inventory.Meta, asked: config.Config) -> bool:
    """Whether nothing is left to do: no update, and card and export are those of the last one."""
    before, after = config.flat(inventory.meta_config(past)), config.flat(asked)
    longer = any(before[name] != after[name] for name in LENGTHS)
    unfinished = longer or past.step < past.facts["updates"]
    if unfinished and not out_of_patience(runlog.read(folder), asked.train):
        return False
    marked = folder / FINISHED
    written = (folder / CARD).is_file() and (folder / EXPORT / "config.json").is_file()
    return written and marked.is_file() and marked.read_bytes().strip() == b"%d" % past.step


def out_of_patience(history: Sequence[Mapping[str, Any]], train: config.TrainConfig) -> bool:
    """Whether so many evaluations in a row as are allowed brought no better score.

    Args:
        history: the events of the log.
        train: which score, and how many.
    """
    if train.early_stopping_patience is None:
        return False
    name = f"eval_{train.metric_for_best_model}"
    return runlog.evaluations_since_best(history, name) >= train.early_stopping_patience


def check_data(past: inventory.Meta, splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses to go on with other clips than those that the run began with.

    Args:
        past: where the run goes on.
        splits: what `train`, `eval` and `test` are now, as in the checkpoint's facts.

    Raises:
        ConfigError: names the sets that differ, with release and clips.
    """
    then = past.facts["splits"]
    changed = [
        f"{name}: was {_described(then, name)}, now {_described(splits, name)}"
        for name in sorted(then.keys() | splits.keys())
        if name not in then or name not in splits or then[name]["hash"] != splits[name]["hash"]
    ]
    if changed:
        raise errors.ConfigError(
            "the data are not those that this run began with:\n  "
            + "\n  ".join(changed)
            + "\nPut the old data.source back, or give another --output_dir, or --restart."
        )


def _described(splits: Mapping[str, Mapping[str, Any]], name: str) -> str:
    if name not in splits:
        return "not there"
    split = splits[name]
    return f"{split['clips']} clips of {split['release']} ({split['hash'][:12]})"


def resolve(asked: config.Config, device_count: int) -> config.Config:
    """The configuration with its number of clips an update written out.

    Raises:
        ConfigError: the devices cannot share the global batch; names what would fit. Or the run
            is to stop early by scores that nobody takes.
    """
    train = asked.train
    if train.early_stopping_patience is not None and not asked.data.eval_splits:
        raise errors.ConfigError(
            f"train.early_stopping_patience is {train.early_stopping_patience}, but"
            " data.eval_splits is empty: name a split, or leave the patience out."
        )
    at_once = device_count * train.per_device_train_batch_size
    size = train.global_batch_size
    if size is None:
        size = at_once * (train.gradient_accumulation_steps or 1)
    elif size % at_once:
        raise errors.ConfigError(
            f"train.global_batch_size {size} is not {device_count} devices x"
            f" train.per_device_train_batch_size {train.per_device_train_batch_size} x a whole"
            f" number: {_fitting(size, device_count)}."
        )
    return dataclasses.replace(
        asked,
        train=dataclasses.replace(train, global_batch_size=size, gradient_accumulation_steps=None),
    )


def group_rows(cfg: config.Config, device_count: int, past: inventory.Meta | None) -> int:
    """Rows of a batch group: what the devices take at once when the run begins, the same later on.

    Raises:
        ConfigError: the devices there are now cannot share such a group; names what would fit.
    """
    at_once = device_count * cfg.train.per_device_train_batch_size
    if past is None:
        return at_once
    if past.group_rows % at_once:
        raise errors.ConfigError(
            f"this run was begun with {past.group_rows} clips at once, which {device_count} devices"
            f" x train.per_device_train_batch_size {cfg.train.per_device_train_batch_size} do not"
            f" divide: {_fitting(past.group_rows, device_count)}."
        )
    return past.group_rows


def _fitting(rows: int, device_count: int) -> str:
    share, rest = divmod(rows, device_count)
    if rest:
        fitting = [str(n) for n in range(1, rows + 1) if rows % n == 0]
        return f"{device_count} devices cannot share {rows} clips; {_or(fitting)} devices could"
    fitting = [str(n) for n in range(1, share + 1) if share % n == 0]
    return f"--train.per_device_train_batch_size {_or(fitting)} would do"


def _or(choices: list[str]) -> str:
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)
