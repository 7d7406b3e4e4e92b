"""Configuration changes that are allowed between starts of a run and between its hosts.

A resumed run may change what leaves the finished updates valid.
"""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import flax_asr
from flax_asr import config, errors, inventory

FREE_TO_CHANGE = frozenset(
    "output_dir data.source data.num_workers data.prepared_dir data.cache_features model.attention"
    " model.remat_policy train.gradient_checkpointing train.logging_steps train.eval_steps"
    " train.save_steps train.save_total_limit train.per_device_train_batch_size"
    " train.per_device_eval_batch_size train.early_stopping_patience train.max_bad_updates"
    " train.on_save_error train.zero_sharding".split()
)
"""Options about where and how fast to train. `check_data` compares the clips of a moved source."""

LENGTHS = ("train.max_steps", "train.num_train_epochs")

UNSET = "not set"
"""Stands for a key that a mapping such as model.config lacks."""

OWN_TO_A_HOST = frozenset(
    "output_dir data.source data.prepared_dir data.num_workers model.pretrained"
    " text.vocabulary".split()
)
"""Paths may differ between hosts: their contents are compared instead."""


def between(old: config.Config, new: config.Config) -> dict[str, tuple[Any, Any]]:
    """Dotted names of options that differ, with both values."""
    before, after = _every_name(old), _every_name(new)
    pairs = {name: (before.get(name, UNSET), after.get(name, UNSET)) for name in before | after}
    return {name: (was, now) for name, (was, now) in pairs.items() if was != now}


def _every_name(cfg: config.Config) -> dict[str, Any]:
    """Every option by its dotted name, including keys of mappings such as model.config."""
    named: dict[str, Any] = {}
    for name, value in config.flat(cfg).items():
        if isinstance(value, dict):
            named |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            named[name] = value
    return named


def check(folder: str, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuses a resume whose updates would differ in meaning from the finished ones.

    Args:
        folder: the run folder, for messages.
        changes: the result of `between`.

    Raises:
        ConfigError: an option may not change; names it, with both values, and what to do.
    """
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


def check_data(past: inventory.Meta, splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses a resume with other clips than those that the run started with.

    Args:
        past: the checkpoint to resume from.
        splits: what `train`, `eval` and `test` are now, as in the checkpoint's facts.

    Raises:
        ConfigError: sets differ; names them, with release and clips.
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


def same_on_all_hosts(cfg: config.Config) -> dict[str, Any]:
    """Options that must be the same on all hosts of a run."""
    settings = {n: v for n, v in config.flat(cfg).items() if n not in OWN_TO_A_HOST}
    versions = {"flax_asr": flax_asr.__version__, "jax": importlib.metadata.version("jax")}
    return settings | versions
