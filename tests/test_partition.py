"""Moments cut over the devices: the same training, less memory, and checkpoints for everyone."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import small_run
import small_saved
import small_update

from flax_asr import checkpoint, parallel, partition

pytestmark = pytest.mark.usefixtures("quick_compilation")

TESTS = pathlib.Path(__file__).parent
META = small_saved.saved().meta
UPDATES = 24


def test_a_matrix_is_cut_along_the_first_axis_that_divides_and_a_vector_never():
    shapes = {"a": (12, 8), "b": (3, 16, 8), "c": (8,), "d": (5, 7)}
    arrays = {path: np.zeros(shape) for path, shape in shapes.items()}
    assert partition.axes(arrays, 4) == {"a": 0, "b": 1}
    assert partition.axes(arrays, 1) == {}


def compare(devices: int, *, cuts: int, **kinds):
    """Updates with a bad one among them, with moments cut and replicated."""
    cut, whole = (small_update.Updates(devices, zero, **kinds) for zero in (True, False))
    assert len(cut.layout.axes) == cuts
    for path in cut.layout.axes:
        for name, moment in cut.whole.items():
            if ".optimiser" in name and path in name:
                assert moment.shape == small_update.SHAPES[path]
    ours, theirs = (updates.run(0, UPDATES, bad=9) for updates in (cut, whole))
    for one, other in zip(ours, theirs, strict=True):
        for name, value in one._asdict().items():
            np.testing.assert_allclose(value, getattr(other, name), rtol=1e-6, err_msg=name)
    assert ours[-1].skipped == 1
    for name, array in whole.whole.items():
        np.testing.assert_allclose(cut.whole[name], array, rtol=1e-6, atol=1e-6, err_msg=name)
    for leaf in jax.tree.leaves((cut.state.trainable, cut.state.loss_scale, cut.state.step)):
        assert len({np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}) == 1


@pytest.mark.parametrize(
    "kinds",
    [
        {"max_grad_norm": 1e6, "ema_decay": 0.9},
        {"mixed_precision": "fp16"},
        {"max_grad_norm": None, "head_learning_rate": 1e-2},
        {"freeze_encoder_steps": 15, "ema_decay": 0.9},
    ],
)
def test_updates_are_the_same_with_moments_cut(kinds):
    compare(2, cuts=3, **kinds)


def test_with_moments_cut_the_encoder_waits_too():
    updates = small_update.Updates(2, True, freeze_encoder_steps=5)
    before = updates.params
    updates.run(0, 5)
    moved = {
        path for path, value in updates.params.items() if value.tobytes() != before[path].tobytes()
    }
    assert moved == {"lm_head/kernel", "lm_head/bias"}
    updates.run(5, 6)
    assert updates.params["wav2vec2/encoder/pos_conv_embed/kernel"].tobytes() != (
        before["wav2vec2/encoder/pos_conv_embed/kernel"].tobytes()
    )


def through_checkpoints(run: pathlib.Path, *kinds: tuple[int, bool]) -> None:
    """Saved by updates of each of these kinds, (devices, cut), and gone on with by all of them."""
    whole = small_update.Updates(1, False)
    whole.run(0, 12)
    made = [small_update.Updates(*kind) for kind in kinds]
    for number, kind in enumerate(kinds, 1):
        saving = small_update.Updates(*kind)
        saving.run(0, 6)
        checkpoints = checkpoint.Checkpoints(run, keep=len(made))
        state = parallel.whole({}, saving.state, saving.layout, saving.devices)
        checkpoints.save(state, dataclasses.replace(META, step=number))
        checkpoints.close()
        saved = saving.whole
        for going_on in made:
            going_on.state = checkpoint.restore(run, number, going_on.shapes)
            for name, array in going_on.whole.items():
                assert array.tobytes() == saved[name].tobytes(), (kind, name)
            going_on.run(6, 12)
            for name, array in going_on.whole.items():
                np.testing.assert_allclose(array, whole.whole[name], rtol=1e-5, atol=1e-5)


def test_checkpoints_are_restored_cut_replicated_and_on_another_number_of_devices(tmp_path):
    through_checkpoints(tmp_path, (2, True), (2, False), (1, True))


def on_four_and_eight(run: str) -> None:
    """What `test_sharding_over_four_and_eight_devices_changes_nothing` runs elsewhere."""
    compare(4, cuts=3)
    compare(8, cuts=3)
    through_checkpoints(pathlib.Path(run), (4, True), (8, True))


@pytest.mark.slow
def test_sharding_over_four_and_eight_devices_changes_nothing(tmp_path):
    code = f"import test_partition; test_partition.on_four_and_eight({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TESTS,
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": str(TESTS.parent),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_losses_of_a_model_are_the_same_with_moments_cut():
    saved = small_saved.saved(num_hidden_layers=1)
    losses = {}
    for zero in (True, False):
        trainer = small_run.Trainer(
            small_run.objective(saved.model_config),
            saved.params,
            devices=2,
            zero_sharding=zero,
            optim={"learning_rate": 1e-3},
        )
        batches = (small_run.batch(2, seed, saved.model_config.vocab_size) for seed in range(20))
        losses[zero] = [trainer.update(batch).loss for batch in batches]
    assert losses[True][-1] < losses[True][0]
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-6)


@pytest.mark.parametrize("fresh", [True, False])
def test_the_norm_is_that_of_all_numbers_in_one_row(fresh):
    rng = np.random.default_rng(0)
    sizes = [(), (3, 4), (5,), (2, 3, 4), *[(7,)] * 11]
    arrays = {str(n): rng.normal(size=(1, *size)) for n, size in enumerate(sizes)}
    found = jax.vmap(
        lambda own: partition.norm(own, {}, fresh), axis_name=partition.AXIS, axis_size=1
    )({name: array.astype(np.float32) for name, array in arrays.items()})
    expected = np.linalg.norm(np.concatenate([array.ravel() for array in arrays.values()]))
    np.testing.assert_allclose(found, [expected], rtol=1e-6)
