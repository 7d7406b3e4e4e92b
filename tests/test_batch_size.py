"""Clips of an update and of a batch group, on the devices that there are."""

import dataclasses

import pytest
import small_folder

from flax_asr import batch_size, config, errors


@pytest.mark.parametrize(
    ("train", "devices", "size"),
    [
        ({"per_device_train_batch_size": 4}, 2, 8),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, 2, 24),
        ({"per_device_train_batch_size": 4, "global_batch_size": 32}, 8, 32),
        ({"per_device_train_batch_size": 4, "global_batch_size": 32}, 1, 32),
    ],
)
def test_the_global_batch_is_resolved(train, devices, size):
    resolved = batch_size.resolve(config.Config(train=config.TrainConfig(**train)), devices)
    assert resolved.train.global_batch_size == size
    assert resolved.train.gradient_accumulation_steps is None
    assert batch_size.resolve(resolved, devices) == resolved


@pytest.mark.parametrize(
    ("size", "per_device", "devices", "expected"),
    [
        (32, 5, 2, "--train.per_device_train_batch_size 1, 2, 4, 8 or 16 would do"),
        (6, 4, 2, "--train.per_device_train_batch_size 1 or 3 would do"),
        (2, 4, 2, "--train.per_device_train_batch_size 1 would do"),
        (10, 1, 4, "4 devices cannot share 10 clips; 1, 2, 5 or 10 devices could"),
    ],
)
def test_a_global_batch_that_does_not_divide_names_what_would_fit(
    size, per_device, devices, expected
):
    train = config.TrainConfig(global_batch_size=size, per_device_train_batch_size=per_device)
    with pytest.raises(errors.ConfigError) as refusal:
        batch_size.resolve(config.Config(train=train), devices)
    start = f"train.global_batch_size {size} is not {devices} devices x"
    assert str(refusal.value).startswith(start)
    assert str(refusal.value).endswith(f"a whole number: {expected}.")


def test_the_group_is_that_of_the_start(tmp_path):
    unfinished = small_folder.configuration(tmp_path)
    past = small_folder.meta(unfinished, 4)
    assert batch_size.group_rows(unfinished, 2, None) == 8
    assert batch_size.group_rows(unfinished, 1, past) == 8
    smaller = dataclasses.replace(past, group_rows=4)
    with pytest.raises(errors.ConfigError, match=r"per_device_train_batch_size 1 or 2 would do"):
        batch_size.group_rows(unfinished, 2, smaller)
    with pytest.raises(errors.ConfigError, match=r"1, 2 or 4 devices could"):
        batch_size.group_rows(unfinished, 8, smaller)
