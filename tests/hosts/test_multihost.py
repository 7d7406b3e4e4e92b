"""Several hosts, as processes of this machine with one device each: as one host, or not at all."""

import json
import pathlib
import shutil
import signal
import time

import numpy as np
import pytest
import small_training
from small_hosts import Pair, finish

from flax_asr import inventory
from flax_asr.record import runlog


@pytest.fixture
def pair(place):
    """Starts the same command twice; options may differ."""

    def start(run, *more, first=(), second=(), **how):
        words = [place.command(run, *more, *own) for own in (first, second)]
        return Pair(place, words, run, **how)

    return start


def predictions(folder: pathlib.Path, name: str) -> list[dict]:
    lines = (folder / f"predictions-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_two_hosts_train_as_one_with_as_many_devices(pair, whole, tmp_path):
    run = tmp_path / "run"
    output = finish(pair(run))
    small_training.assert_same(run, whole)
    for split in ("eval", "test"):
        assert predictions(run, split) == predictions(whole, split)
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
    assert len(list((run / "tensorboard").iterdir())) == 1
    # What concerns all is said once.
    assert output.count("updates of 8 clips") == 1
    assert output.count("training: 8/8 updates") == 1
    assert "Traceback" not in output


@pytest.mark.slow
def test_two_hosts_score_as_one(place, whole, tmp_path):
    words = ["evaluate", "--model", str(whole), "--json", str(tmp_path / "two.jsonl")]
    words += [f"--data.source={place.source}", f"--data.prepared_dir={place.folder / 'prepared'}"]
    copies = [shutil.copytree(whole, tmp_path / f"copy-{index}") for index in range(2)]
    for index, copy in enumerate(copies):
        (copy / "predictions-test.jsonl").unlink()
        words[2] = str(copy)
        copies[index] = list(words)
    with Pair(place, copies, tmp_path / "two") as two:
        assert two.end() == [0, 0], two.output
    (tested,) = [event for event in runlog.read(whole) if "best_step" in event]
    (line,) = map(json.loads, (tmp_path / "two.jsonl").read_text().splitlines())
    assert line["clips"] == small_training.CLIPS["test"]
    for name in ("loss", "cer", "wer"):
        assert line[f"eval_{name}"] == pytest.approx(tested[f"test_{name}"], rel=1e-6)
    assert predictions(tmp_path / "copy-0", "test") == predictions(whole, "test")
    assert not (tmp_path / "copy-1" / "predictions-test.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_host_stops_both_at_the_same_update(pair, whole, tmp_path, asked, number):
    run = tmp_path / "run"
    with pair(run) as two:
        two.hosts[asked].wait_for(lambda: len(runlog.read(run)) > 1)
        two.hosts[asked].signal(number)
        assert two.end() == [75, 75], two.output
        (newest, *_) = inventory.steps(run)
        for host in two.hosts:
            assert f"stopped after update {newest}; everything is saved" in host.output
        assert two.output.count("finishing this update") == 1
    assert f"going on after update {newest}" in finish(pair(run))
    small_training.assert_same(run, whole)


@pytest.mark.slow
def test_a_signal_while_one_host_compiles_ends_both(pair, tmp_path):
    run = tmp_path / "run"
    with pair(run) as two:
        two.hosts[0].wait_for(lambda: "programs to compile" in two.hosts[0].output)
        two.hosts[1].signal(signal.SIGTERM)
        assert two.end() == [75, 75], two.output
        assert "host 1: SIGTERM: stopped. Run the same command" in two.hosts[0].output
    assert inventory.steps(run) == []


@pytest.mark.slow
def test_another_configuration_on_one_host_is_refused(pair, tmp_path):
    run = tmp_path / "run"
    with pair(run, second=["--optim.learning_rate=0.02", "--seed=7"]) as two:
        assert two.end() == [2, 2], two.output
        for host in two.hosts:
            assert "the hosts do not have the same configuration:" in host.output
            assert "optim.learning_rate: 0.01 on host 0, 0.02 on host 1" in host.output
            assert "Traceback" not in host.output
    assert inventory.steps(run) == []


@pytest.mark.slow
def test_each_host_may_have_its_own_copy_of_the_data(pair, place, whole, tmp_path):
    run = tmp_path / "run"
    options = [[], []]
    for index, own in enumerate(options):
        source = shutil.copytree(place.source, tmp_path / f"host-{index}" / "cv-corpus-1")
        own += [f"--data.source={source}", f"--data.prepared_dir={source.parent / 'prepared'}"]
    finish(pair(run, first=options[0], second=options[1]))
    small_training.assert_same(run, whole)
    for index in range(2):
        assert (tmp_path / f"host-{index}" / "prepared" / "train" / "manifest.json").is_file()


@pytest.mark.slow
def test_hosts_with_one_disk_prepare_once(pair, whole, tmp_path):
    run = tmp_path / "run"
    output = finish(pair(run, f"--data.prepared_dir={tmp_path / 'prepared'}"))
    assert output.count("preparing train: 16/16 clips") == 1
    small_training.assert_same(run, whole)


@pytest.mark.slow
def test_other_data_on_one_host_are_refused(pair, tmp_path):
    run = tmp_path / "run"
    other = small_training.corpus(tmp_path / "other")
    table = other / "cy" / "train.tsv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    own = [f"--data.source={other}", f"--data.prepared_dir={tmp_path / 'prepared'}"]
    with pair(run, second=own) as two:
        assert two.end() == [2, 2], two.output
        for host in two.hosts:
            assert "the hosts do not have the same data or weights:" in host.output
            assert "clips of train: '16 of " in host.output
            assert "'15 of " in host.output
    assert inventory.steps(run) == []


@pytest.mark.slow
def test_a_run_folder_that_one_host_does_not_see_is_refused(pair, tmp_path):
    with pair(tmp_path / "run", second=[f"--output_dir={tmp_path / 'other'}"]) as two:
        assert two.end() == [2, 2], two.output
        for host in two.hosts:
            assert f"output_dir {tmp_path / 'other'} is not that of the first host" in host.output


@pytest.mark.slow
def test_an_error_of_one_host_ends_the_other_with_its_message(pair, tmp_path):
    run = tmp_path / "run"
    with pair(run) as two:
        two.hosts[0].wait_for(lambda: len(runlog.read(run)) > 1)
        (run / inventory.FOLDER).rename(run / "elsewhere")
        (run / inventory.FOLDER).touch()
        assert two.end() == [2, 2], two.output
        assert "flax-asr: cannot write a checkpoint" in two.hosts[0].output
        assert "host 0: cannot write a checkpoint" in two.hosts[1].output


@pytest.mark.slow
def test_a_host_that_is_killed_ends_the_other_within_the_limit(pair, whole, tmp_path):
    run = tmp_path / "run"
    with pair(run, lost_seconds=15) as two:
        two.hosts[1].wait_for(lambda: len(runlog.read(run)) > 1)
        two.hosts[1].kill()
        killed = time.monotonic()
        two.hosts[0].wait_for(lambda: "host 1: not heard of for 15 seconds" in two.hosts[0].output)
        assert two.hosts[0].end(60) == 75, two.output
        assert time.monotonic() - killed < 90
        assert "Traceback" not in two.hosts[0].output
    finish(pair(run))
    small_training.assert_same(run, whole)


@pytest.mark.slow
def test_when_the_first_host_is_killed_jax_ends_the_other(pair, whole, tmp_path):
    run = tmp_path / "run"
    with pair(run) as two:
        two.hosts[1].wait_for(lambda: len(runlog.read(run)) > 1)
        two.hosts[0].kill()
        assert two.hosts[1].end(60) == -signal.SIGABRT, two.output
        assert "This most likely indicates that another task died" in two.hosts[1].output
    finish(pair(run))
    small_training.assert_same(run, whole)


@pytest.mark.slow
def test_moments_cut_over_two_hosts_train_as_whole_ones_and_go_on_elsewhere(pair, place, tmp_path):
    """From two hosts with cut moments to one with whole ones, and the other way round."""
    options = ("--optim.lr_scheduler_type=constant", "--optim.ema_decay=0.7")
    cut = (*options, "--train.zero_sharding=true")
    half, all_of_it = (f"--train.max_steps={updates}" for updates in (4, small_training.UPDATES))
    stayed, two_first, two_then = (tmp_path / name for name in ("stayed", "first", "then"))
    place.finish(stayed, *options, all_of_it)

    output = finish(pair(two_first, *cut, half))
    assert "warning: train.zero_sharding" not in output
    place.finish(two_first, *options, all_of_it)
    place.finish(two_then, *options, half)
    finish(pair(two_then, *cut, all_of_it))

    def figures(run):
        events = [event for event in small_training.log(run) if "best_step" not in event]
        return [
            {name: value for name, value in event.items() if isinstance(value, (int, float))}
            for event in events
            if "loss" in event or "eval_loss" in event
        ]

    for run in (two_first, two_then):
        assert len(figures(run)) == len(figures(stayed))
        for ours, theirs in zip(figures(run), figures(stayed), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6), run
        ours, theirs = (small_training.arrays(r, small_training.UPDATES) for r in (run, stayed))
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            # The gradient of a key's bias is nothing but rounding, which Adam makes large.
            near = 1e-5 if name.endswith("k_proj/bias") else 1e-6
            np.testing.assert_allclose(ours[name], array, rtol=1e-5, atol=near, err_msg=name)


TOPOLOGIES = {
    "1": ("--train.per_device_train_batch_size=8",),
    "2": ("--train.per_device_train_batch_size=4",),
    "8": ("--train.per_device_train_batch_size=1",),
    "two hosts": ("--train.per_device_train_batch_size=4",),
}
"""Devices, or hosts with one each; every way of going on from one to another is in the journey."""

JOURNEY = ["1", "2", "1", "8", "1", "two hosts", "2", "8", "2", "two hosts", "8", "two hosts", "1"]


@pytest.mark.slow
def test_a_run_goes_on_on_any_other_devices_and_hosts(pair, place, tmp_path):
    steps_each = 8
    dropouts = [f"{kind}_dropout" for kind in "hidden attention activation final".split()]
    chances = [*dropouts, "layerdrop", "mask_time_prob", "mask_feature_prob"]
    options = [
        *(f"--model.config.{name}=0" for name in chances),
        "--optim.lr_scheduler_type=constant",
        "--optim.learning_rate=1e-3",
        "--train.eval_steps=1",
        "--data.test_splits=[]",
    ]

    def go_on(run, kind, updates):
        words = [*options, *TOPOLOGIES[kind], f"--train.max_steps={updates}"]
        if kind == "two hosts":
            finish(pair(run, *words))
        else:
            place.finish(run, *words, devices=int(kind))

    travelled, stayed = tmp_path / "travelled", tmp_path / "stayed"
    go_on(stayed, "1", steps_each * len(JOURNEY))
    for number, kind in enumerate(JOURNEY, 1):
        go_on(travelled, kind, steps_each * number)

    def losses(run):
        return [event["eval_loss"] for event in runlog.read(run) if "eval_loss" in event]

    assert len(losses(stayed)) == steps_each * len(JOURNEY)
    assert losses(travelled) == pytest.approx(losses(stayed), rel=1e-5)
