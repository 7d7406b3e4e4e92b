"""The number of clips in an update, and in a batch group that the devices take at once.

`train.global_batch_size` is the number of clips in an update, whatever the devices. A batch group
is what the devices take at once when a run starts. Its size is fixed for the run, so that the run
can resume on other devices with the same batch plan (buckets.py).
"""

import dataclasses

from flax_asr import config, errors, inventory


def resolve(asked: config.Config, device_count: int) -> config.Config:
    """The configuration with `train.global_batch_size` filled in.

    Raises:
        ConfigError: the devices cannot share the global batch; lists sizes that fit.
    """
    train = asked.train
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
    """Rows of a batch group: what the devices take at once when the run starts; fixed after that.

    Raises:
        ConfigError: the present devices cannot share such a group; lists sizes that fit.
    """
    at_once = device_count * cfg.train.per_device_train_batch_size
    if past is None:
        return at_once
    if past.group_rows % at_once:
        raise errors.ConfigError(
            f"this run was started with {past.group_rows} clips at once, which {device_count}"
            f" devices x train.per_device_train_batch_size"
            f" {cfg.train.per_device_train_batch_size} do not divide:"
            f" {_fitting(past.group_rows, device_count)}."
        )
    return past.group_rows


def _fitting(rows: int, device_count: int) -> str:
    """The end of a message: per-device batch sizes that fit so many rows."""
    share, rest = divmod(rows, device_count)
    if rest:
        fitting = [str(n) for n in range(1, rows + 1) if rows % n == 0]
        return f"{device_count} devices cannot share {rows} clips; {_or(fitting)} devices could"
    fitting = [str(n) for n in range(1, share + 1) if share % n == 0]
    return f"--train.per_device_train_batch_size {_or(fitting)} would do"


def _or(choices: list[str]) -> str:
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)
