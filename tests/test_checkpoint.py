"""Checkpoints: bit-exact, kept by rule, never used when damaged, refused when they do not fit."""

import dataclasses
import errno
import json
import logging
import pathlib
import re
import resource
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_folder
import small_saved
import small_training

from flax_asr import (
    assembly,
    checkpoint,
    config,
    errors,
    experiment,
    inventory,
    loop,
    optim,
    parallel,
    run_folder,
    seals,
    step,
)
from flax_asr.bucket import mirror
from flax_asr.data import rereading
from flax_asr.hosts import multihost, stopping
from flax_asr.record import runlog

SAVED = small_saved.saved()
CONFIGURATION = config.build(SAVED.meta.run)


def fresh(seed: int = 0, devices: int = 2, params=None, optimiser=None) -> step.TrainState:
    """A placed state in which every array is random, moments and counters too."""
    if optimiser is None:
        optimiser = optim.adamw(CONFIGURATION.optim, lambda count: 1e-3)
    state = experiment.fresh_state(
        CONFIGURATION, SAVED.model_config, params or SAVED.params, optimiser
    )
    rng = np.random.default_rng(seed)

    def random(leaf):
        leaf = np.asarray(leaf)
        if leaf.dtype == np.float32:
            return rng.standard_normal(leaf.shape, np.float32)
        return rng.integers(0, 2**31, leaf.shape, dtype=np.int64).astype(leaf.dtype)

    return placed(jax.tree.map(random, state), devices)


def placed(state, devices: int = 2):
    return parallel.Devices(jax.devices()[:devices]).replicate(state)


def shapes(state):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def meta(number: int, **changes) -> inventory.Meta:
    return dataclasses.replace(SAVED.meta, step=number, **changes)


def assert_equal(one, other):
    paths, structure = jax.tree.flatten(one)
    others, same = jax.tree.flatten(other)
    assert structure == same
    for a, b in zip(paths, others, strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(run, states, keep: int = 9, scores=None) -> None:
    """Saves states by their steps, with these scores, and closes."""
    writer = checkpoint.Checkpoints(run, keep)
    for number, state in states.items():
        found = {} if scores is None or number not in scores else {"eval_cer": scores[number]}
        writer.save(state, meta(number, metrics=found))
    writer.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run folder with the steps 2 and 4; not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "run"
    run.mkdir()
    save(run, {2: fresh(2), 4: fresh(4)}, scores={2: 0.25, 4: 0.5})
    run_folder.record(run, CONFIGURATION)
    return run


@pytest.fixture
def run(two, tmp_path):
    """A copy of it."""
    return pathlib.Path(shutil.copytree(two, tmp_path / "run"))


@pytest.mark.parametrize("name", ["rate [1e-4]", "a\\b", "**"])
def test_a_state_comes_back_from_a_folder_whose_name_is_a_pattern(tmp_path, name):
    run, state = tmp_path / name, fresh()
    run.mkdir()
    save(run, {1: state})
    seals.verify(run / inventory.FOLDER / "1")
    assert_equal(checkpoint.restore(run, 1, shapes(state)), state)
    moved = run.rename(tmp_path / f"moved {name}")
    assert checkpoint.load_model(moved).step == 1


@pytest.mark.parametrize("devices", [1, 2])
def test_a_state_comes_back_bit_for_bit_on_any_devices(two, devices):
    wanted = fresh(4, devices)
    restored = checkpoint.restore(two, 4, shapes(wanted))
    assert_equal(restored, wanted)
    for leaf in jax.tree.leaves(restored):
        assert leaf.is_fully_replicated
        assert leaf.sharding == jax.tree.leaves(wanted)[0].sharding


def test_meta_comes_back_equal(two):
    # JSON makes strings of the numbers that are keys in transformers' configuration.
    through_json = json.loads(json.dumps(SAVED.meta.model_config))
    wanted = meta(2, metrics={"eval_cer": 0.25}, model_config=through_json)
    assert inventory.read_meta(two, 2) == wanted


def test_meta_is_utf_8_whatever_it_holds(tmp_path):
    odd = {"path": pathlib.Path("/a"), "tuple": (1, "é"), "half": "\ud800", "nan": float("nan")}
    writer = checkpoint.Checkpoints(tmp_path, 1)
    writer.save(fresh(), meta(1, facts=odd, normalization=("lower", "香")))
    writer.close()
    (tmp_path / inventory.FOLDER / "1" / inventory.META).read_bytes().decode("utf-8")
    found = inventory.read_meta(tmp_path, 1)
    assert found.normalization == ["lower", "香"]
    assert np.isnan(found.facts.pop("nan"))
    assert found.facts == {"path": "/a", "tuple": [1, "é"], "half": "\ud800"}


def test_the_saved_state_is_that_of_its_step_while_updates_go_on(tmp_path):
    """The buffers are donated to the next update as soon as `save` returns."""
    rng = np.random.default_rng(0)
    # Odd sizes, so that no copy is made by slicing; large, so that writing takes long.
    values = {str(n): rng.standard_normal((1001, 501), np.float32) for n in range(6)}
    state = {"trainable": values, "frozen": {}}
    devices = parallel.Devices()
    update = jax.pmap(
        lambda tree, one: jax.tree.map(lambda leaf: leaf + one, tree),
        axis_name="devices",
        in_axes=(None, 0),
        out_axes=None,
        donate_argnums=(0,),
    )
    ones = np.ones(devices.count, np.float32)
    current = devices.replicate(state)
    writer = checkpoint.Checkpoints(tmp_path, 9)
    expected = {}
    for number in range(1, 4):
        current = update(current, ones)
        expected[number] = jax.tree.map(np.array, current)
        writer.save(current, meta(number))
        for _ in range(10):
            current = update(current, ones)
    writer.close()
    for number, wanted in expected.items():
        assert_equal(checkpoint.restore(tmp_path, number, shapes(current)), wanted)


def kept(run) -> list[int]:
    return inventory.steps(run)


def test_the_latest_and_the_best_are_kept_over_a_reopening(tmp_path):
    state = fresh()
    scores = {1: 0.9, 2: 0.1, 3: 0.5, 4: float("nan"), 6: 0.1}
    save(tmp_path, dict.fromkeys((1, 2, 3), state), keep=1, scores=scores)
    assert kept(tmp_path) == [3, 2]
    there = {path.name for path in (tmp_path / inventory.FOLDER).iterdir()}
    assert there == {"2", "3"}  # nothing of the other one takes room under a hidden name
    save(tmp_path, dict.fromkeys((4, 5, 6), state), keep=1, scores=scores)
    # 6 is as good as 2, which came first.
    assert kept(tmp_path) == [6, 2]
    save(tmp_path, {7: state}, keep=2, scores={7: 0.05})
    assert kept(tmp_path) == [7, 6]
    assert checkpoint.load_model(tmp_path).step == 7
    save(tmp_path, {8: state}, keep=9)
    assert kept(tmp_path) == [8, 7, 6]


def test_the_model_of_a_checkpoint_is_the_average_where_one_is_kept(tmp_path):
    state = fresh()
    average = jax.tree.map(lambda leaf: leaf + 1, state.trainable)
    save(tmp_path, {1: state.replace(average=average)})
    found = step.flat(checkpoint.load_model(tmp_path).params)
    expected = {**state.trainable, **state.frozen, **average}
    assert found.keys() == expected.keys()
    assert average
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_what_is_sealed_is_on_the_disk(tmp_path, done):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    seals.write(tmp_path)
    assert done == ["a", "b", seals.FILE]


def test_a_checkpoint_has_its_name_on_the_disk_before_an_older_one_goes(tmp_path, done):
    save(tmp_path, {n: fresh(n) for n in (1, 2)}, keep=1)
    folder = inventory.FOLDER
    moved = [entry for entry in done if entry == folder or " -> " in entry]
    assert moved[2:] == [".unfinished-2 -> 2", folder, "1 -> .replaced-1"]


def test_without_scores_the_newest_is_the_best(tmp_path):
    save(tmp_path, {n: fresh() for n in (1, 2, 3)}, keep=2)
    assert kept(tmp_path) == [3, 2]
    assert checkpoint.load_model(tmp_path).step == 3


def test_a_step_can_be_saved_again(run):
    save(run, {4: fresh(5)}, scores={4: 0.125})
    assert_equal(checkpoint.restore(run, 4, shapes(fresh())), fresh(5))
    assert inventory.read_meta(run, 4).metrics == {"eval_cer": 0.125}
    assert kept(run) == [4, 2]


def test_what_a_kill_left_half_written_is_no_checkpoint(run):
    for name in (".unfinished-6", ".replaced-1"):
        shutil.copytree(run / inventory.FOLDER / "2", run / inventory.FOLDER / name)
    assert kept(run) == [4, 2]
    checkpoint.Checkpoints(run, 9).close()
    assert sorted(p.name for p in (run / inventory.FOLDER).iterdir()) == ["2", "4"]


def test_an_empty_run_has_no_checkpoint(tmp_path):
    assert inventory.newest_sound(tmp_path) is None
    with pytest.raises(errors.CheckpointError, match="there is no checkpoint in"):
        checkpoint.load_model(tmp_path)


def files_of(run, number: int) -> list[pathlib.Path]:
    folder = run / inventory.FOLDER / str(number)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damages(content: bytes, rng: np.random.Generator):
    """One flipped bit in some places, a cut, nothing left, not there."""
    for _ in range(12):
        changed = bytearray(content)
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
        yield "flip", bytes(changed)
    yield "cut", content[: rng.integers(len(content))]
    yield "longer", content + b"\0"
    yield "empty", b""
    yield "missing", None


def test_any_damage_to_any_file_is_noticed_and_the_older_one_is_used(run, caplog):
    rng = np.random.default_rng(0)
    count = 0
    for path in files_of(run, 4):
        content = path.read_bytes()
        if not content:  # orbax's marker that it has committed
            path.unlink()
            assert inventory.newest_sound(run) == 2
            path.write_bytes(b"")
            continue
        for kind, damaged in damages(content, rng):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            caplog.clear()
            assert inventory.newest_sound(run) == 2, (kind, path)
            assert "the checkpoint of step 4 is not used" in caplog.text
            # A flip inside of the seal shows in the file that it then speaks wrongly of.
            assert str(path) in caplog.text or path.name == seals.FILE
            path.write_bytes(content)
            count += 1
    assert count >= 100
    assert inventory.newest_sound(run) == 4


def test_damage_to_all_of_them_is_one_clear_error(run):
    for number in (2, 4):
        (run / inventory.FOLDER / str(number) / inventory.META).unlink()
    with pytest.raises(errors.CheckpointError) as refusal:
        inventory.newest_sound(run)
    message = str(refusal.value)
    assert message.startswith(f"no checkpoint in {run / inventory.FOLDER} is sound: ")
    assert all(f"{number}/{inventory.META} is missing" in message for number in (2, 4))
    assert "--restart" in message


def test_newer_damaged_checkpoints_are_set_aside(run):
    inventory.set_aside(run, newer_than=2)
    assert kept(run) == [2]
    assert (run / inventory.FOLDER / "damaged-4" / seals.FILE).is_file()


def test_a_damaged_checkpoint_is_set_aside_beside_an_older_one_that_stays(run, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    damaged = run / inventory.FOLDER / "damaged-4"
    damaged.mkdir()
    (damaged / "open").touch()
    inventory.set_aside(run, newer_than=2)
    assert (damaged.with_name("damaged-4-2") / seals.FILE).is_file()


def test_a_damaged_best_checkpoint_gives_way_to_the_next_best(run, caplog):
    assert checkpoint.load_model(run).step == 2
    weights = max(files_of(run, 2), key=lambda path: path.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-1])
    assert checkpoint.load_model(run).step == 4
    assert str(weights) in caplog.text


def test_damaged_scores_are_named(run, caplog):
    """A score that became worse by a flipped bit must not quietly cost its checkpoint the place."""
    path = run / inventory.FOLDER / "2" / inventory.META
    path.write_text(path.read_text().replace('"eval_cer": 0.25', '"eval_cer": 0.75'))
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load_model(run).step == 4
    assert f"{path} has changed since it was written" in caplog.text


def test_the_model_comes_back(two):
    model = checkpoint.load_model(two, 4)
    assert (model.step, model.language) == (4, "eu")
    assert model.model_config.to_dict() == SAVED.model_config.to_dict()
    assert model.vocabulary == SAVED.vocabulary
    state = fresh(4)
    wanted = step.merge(state.trainable, state.frozen)
    assert_equal(model.params, jax.tree.map(np.asarray, wanted))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(model.params))
    assert inventory.is_run(two)
    assert inventory.meta_config(model.meta) == CONFIGURATION


def test_a_step_that_is_not_there_is_named_with_those_that_are(two):
    with pytest.raises(errors.CheckpointError, match=r"no checkpoint of step 3; there: 4, 2\."):
        checkpoint.load_model(two, 3)


def test_a_damaged_step_is_not_loaded(run):
    (run / inventory.FOLDER / "4" / seals.FILE).unlink()
    with pytest.raises(errors.CheckpointError, match=r"seal\.json cannot be read"):
        checkpoint.load_model(run, 4)


def changed_meta(run, step, change):
    """As somebody does who knows how to seal."""
    folder = run / inventory.FOLDER / str(step)
    meta = json.loads((folder / inventory.META).read_text())
    change(meta)
    (folder / inventory.META).write_text(json.dumps(meta))
    seals.write(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda meta: meta.update(new=1), r"4/meta\.json was not written by this version"),
        (lambda meta: meta.pop("window"), r"4/meta\.json was not written by this version"),
        (lambda meta: meta.update(step=8), "checkpoint of step 8, renamed"),
    ],
)
def test_a_checkpoint_that_says_something_else_is_passed_over(run, caplog, damage, message):
    changed_meta(run, 4, damage)
    assert inventory.newest_sound(run) == 2
    assert re.search(f"step 4 is not used: .*{message}", caplog.text)


def test_only_a_number_is_the_name_of_a_step(run):
    for name in ("²", "4x", "-4", "x"):
        (run / inventory.FOLDER / name).mkdir()
    assert inventory.steps(run) == [4, 2]


def test_a_seal_of_files_elsewhere_does_not_hold(run):
    path = run / inventory.FOLDER / "4" / seals.FILE
    sealed = json.loads(path.read_text())
    for name in ("../2/meta.json", "/etc/hostname"):
        path.write_text(json.dumps(sealed | {name: {"bytes": 1, "sha256": "0"}}))
        with pytest.raises(errors.CheckpointError, match="which is not in its folder"):
            seals.verify(run / inventory.FOLDER / "4")


def test_another_architecture_or_vocabulary_is_refused_with_the_difference(two):
    larger = small_saved.saved(hidden_size=36, vocab_size=12)
    with pytest.raises(errors.CheckpointError) as refusal:
        checkpoint.restore(two, 4, shapes(fresh(params=larger.params)))
    message = str(refusal.value)
    assert f"{two / inventory.FOLDER / '4'} is of another model or optimiser: " in message
    assert re.search(
        r"\S+ is \w+ \([\d, ]+\) there and \w+ \([\d, ]+\) here; .*; \d+ more", message
    )
    assert "--restart" in message
    deeper = small_saved.saved(num_hidden_layers=3)
    with pytest.raises(errors.CheckpointError, match=r"layers/2/.* is absent there and float32 \("):
        checkpoint.restore(two, 4, shapes(fresh(params=deeper.params)))


def test_another_type_of_number_is_refused_with_the_difference(two):
    halved = jax.tree.map(
        lambda leaf: leaf.update(dtype=jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf,
        shapes(fresh()),
    )
    with pytest.raises(errors.CheckpointError, match=r"is float32 \(.*\) there and bfloat16 \("):
        checkpoint.restore(two, 4, halved)


def test_another_optimiser_is_refused_with_the_difference(two):
    unclipped = dataclasses.replace(CONFIGURATION.optim, max_grad_norm=None)
    other = fresh(optimiser=optim.adamw(unclipped, lambda count: 1e-3))
    with pytest.raises(
        errors.CheckpointError, match=r"optimiser/\S+ is absent there and float32 \("
    ):
        checkpoint.restore(two, 4, shapes(other))


def test_another_vocabulary_is_refused_with_the_difference():
    past = meta(4)
    inventory.check_vocabulary(past, SAVED.vocabulary)
    with pytest.raises(errors.CheckpointError) as refusal:
        inventory.check_vocabulary(past, small_folder.VOCABULARY)
    assert "only there: 'defgh', only here: ''" in str(refusal.value)
    assert "11 symbols, here 6" in str(refusal.value)
    assert "or the file of text.vocabulary have changed" in str(refusal.value)


def save_now(writer, state):
    writer.save(state, meta(6))
    writer.wait()


def test_a_failure_that_nobody_foresaw_is_no_saved_checkpoint(run, monkeypatch):
    """In the thread that seals: the run must not go on as if the step were there."""
    writer = checkpoint.Checkpoints(run, 9)
    with monkeypatch.context() as broken:
        broken.setattr(seals, "write", lambda folder: {}["no such thing"])
        writer.save(fresh(5), meta(5))
        with pytest.raises(KeyError, match="no such thing"):
            writer.wait()
    assert inventory.steps(run) == [4, 2]
    writer.save(fresh(6), meta(6))
    writer.close()
    assert inventory.steps(run) == [6, 4, 2]


def test_a_closed_writer_leaves_the_process_as_it_was(tmp_path, monkeypatch):
    """With a save behind it, and with one that fails while it is closed."""
    before = small_training.process()
    writer = checkpoint.Checkpoints(tmp_path, 9)
    save_now(writer, fresh(1))
    writer.close()
    assert not small_training.changed(before)
    writer = checkpoint.Checkpoints(tmp_path, 9)
    monkeypatch.setattr(seals, "write", lambda folder: {}["no such thing"])
    writer.save(fresh(2), meta(2))
    with pytest.raises(KeyError, match="no such thing"):
        writer.close()
    assert not small_training.changed(before)


def test_a_run_that_fails_while_it_is_set_up_lets_go_of_what_it_opened(tmp_path, monkeypatch):
    made = object.__new__(assembly.Assembly)
    vars(made).update(cfg=small_folder.configuration(tmp_path), devices=None, past=None)
    monkeypatch.setattr(made, "initial_state", fresh)
    (tmp_path / runlog.FILE).mkdir()
    hosts, audio = multihost.Hosts(), rereading.Rereading([])
    before = small_training.process()
    with pytest.raises(errors.CheckpointError, match=r"cannot write .*log\.jsonl"):
        loop.Run(made, {}, tmp_path, stopping.Stop(), hosts, mirror.Nowhere(), audio)
    assert (tmp_path / inventory.FOLDER).is_dir()
    assert not small_training.changed(before)


def test_a_full_disk_is_one_clear_error_and_costs_no_older_checkpoint(run):
    writer = checkpoint.Checkpoints(run, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(errors.CheckpointError, match="cannot write a checkpoint in") as refusal:
            save_now(writer, fresh(6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in str(refusal.value)
    assert "Checkpoints there: 4, 2." in str(refusal.value)
    assert sorted(p.name for p in (run / inventory.FOLDER).iterdir()) == ["2", "4"]
    assert inventory.newest_sound(run) == 4
    # With room again, the same run goes on.
    writer.save(fresh(6), meta(6))
    writer.close()
    assert_equal(checkpoint.restore(run, 6, shapes(fresh())), fresh(6))


def test_what_does_not_fit_on_the_disk_is_not_begun(run, monkeypatch):
    writer = checkpoint.Checkpoints(run, 2)
    (run / inventory.FOLDER / ".unfinished-5").mkdir()  # of a writer that failed late
    needed = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(fresh(6)))

    def disk(total, free):
        usage = types.SimpleNamespace(total=total, free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    disk(10 * needed, needed - 1)
    with pytest.raises(errors.CheckpointError, match=r"No space left on device.*MB are free\."):
        writer.save(fresh(6), meta(6))
    assert sorted(p.name for p in (run / inventory.FOLDER).iterdir()) == ["2", "4"]
    disk(10 * needed, needed)
    writer.save(fresh(6), meta(6))
    disk(0, 0)
    writer.save(fresh(8), meta(8))
    writer.close()
    assert inventory.steps(run)[:2] == [8, 6]


def test_what_cannot_be_removed_is_told_once_and_the_run_goes_on(run, monkeypatch, caplog):
    """Checkpoints whose files cannot be deleted, some with the names that others would have."""
    folder, rmtree = run / inventory.FOLDER, shutil.rmtree
    left = (".replaced-4", ".replaced-6", ".unfinished-6", ".unfinished-8")
    for name in left:
        (folder / name).mkdir()
        (folder / name / "of a run before").touch()

    def refused(path, ignore_errors=False):
        if not path.name.startswith((".replaced-", ".unfinished-")):
            rmtree(path)
        elif not ignore_errors:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path / "meta.json"))

    with monkeypatch.context() as broken:
        broken.setattr(shutil, "rmtree", refused)
        writer = checkpoint.Checkpoints(run, 1)
        for number, seed in ((6, 6), (6, 7), (8, 8)):
            writer.save(fresh(seed), meta(number))
            writer.wait()
        assert {path.name for path in folder.iterdir()} == {
            *left,
            *(".replaced-4-2", ".replaced-6-2", ".replaced-6-3"),
            *("2", "8"),
        }
        assert_equal(checkpoint.restore(run, 8, shapes(fresh())), fresh(8))
    (told,) = (record.getMessage() for record in caplog.records)
    assert re.search(r"-\d is not needed any more and cannot be removed: Operation not", told)
    writer.save(fresh(9), meta(9))
    writer.close()
    assert sorted(path.name for path in folder.iterdir()) == ["2", "9"]
    assert_equal(checkpoint.restore(run, 9, shapes(fresh())), fresh(9))


def test_a_vanished_folder_is_one_clear_error(run):
    writer = checkpoint.Checkpoints(run, 1)
    shutil.rmtree(run)
    with pytest.raises(errors.CheckpointError, match="No such file") as refusal:
        writer.save(fresh(6), meta(6))
    assert "Checkpoints there: none." in str(refusal.value)
    writer.close()


def test_a_seal_names_every_file(two):
    folder = two / inventory.FOLDER / "4"
    sealed = json.loads((folder / seals.FILE).read_text())
    names = {path.relative_to(folder).as_posix() for path in files_of(two, 4)}
    assert sealed.keys() == names - {seals.FILE}
    assert {inventory.META} < sealed.keys()
