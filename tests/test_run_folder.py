"""What a second run does with a run folder, case by case."""

import errno
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import small_folder

from flax_asr import config, differences, errors, inventory, run_folder
from flax_asr.record import runlog


def resumed(folder, cfg, restart=False):
    return run_folder.resume_point(folder, cfg, restart)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def unfinished(folder):
    return small_folder.run(folder, small_folder.configuration(folder))


def test_an_empty_or_absent_folder_is_a_fresh_run(folder):
    assert resumed(folder, small_folder.configuration(folder)) is None
    folder.mkdir()
    assert resumed(folder, small_folder.configuration(folder)) is None


def test_before_the_first_checkpoint_every_configuration_is_a_fresh_run(folder):
    small_folder.run(folder, small_folder.configuration(folder), steps=())
    # What a kill in mid-save leaves.
    (folder / inventory.FOLDER / ".unfinished-2" / "state").mkdir(parents=True)
    changed = small_folder.configuration(folder, optim={"learning_rate": 1.0})
    assert resumed(folder, changed) is None


def test_an_unfinished_run_goes_on_from_its_newest_checkpoint(folder, unfinished):
    past = resumed(folder, unfinished)
    assert past == small_folder.meta(unfinished, 4)
    assert not run_folder.is_finished(folder, past, unfinished)


def test_the_newest_checkpoint_is_that_of_the_highest_step_whatever_the_clock_said(
    folder, unfinished
):
    for step, seconds in ((4, 1), (2, 4e9)):
        for path in (folder / inventory.FOLDER / str(step)).rglob("*"):
            os.utime(path, (seconds, seconds))
        os.utime(folder / inventory.FOLDER / str(step), (seconds, seconds))
    assert resumed(folder, unfinished).step == 4


def test_the_configuration_comes_back_equal(folder, unfinished):
    assert config.load(folder / run_folder.CONFIG) == unfinished


def test_checkpoints_without_a_configuration_are_refused(folder, unfinished):
    (folder / run_folder.CONFIG).unlink()
    with pytest.raises(errors.CheckpointError, match=r"no config\.yaml.*--restart"):
        resumed(folder, unfinished)


@pytest.fixture
def finished(folder):
    return small_folder.run(folder, small_folder.configuration(folder), steps=(4, 6), finished=True)


def test_a_finished_run_is_finished(folder, finished):
    assert run_folder.is_finished(folder, resumed(folder, finished), finished)


@pytest.mark.parametrize(
    "lost", [run_folder.CARD, f"{run_folder.EXPORT}/config.json", run_folder.FINISHED]
)
def test_a_run_whose_outputs_are_lost_is_not_finished(folder, finished, lost):
    (folder / lost).unlink()
    assert not run_folder.is_finished(folder, resumed(folder, finished), finished)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00\n", b"six\n", b"4\n", b"6\n6\n", b"-6", b"6" * 9000]
)
def test_a_run_whose_mark_of_the_end_is_damaged_is_finished_once_more(folder, finished, content):
    (folder / run_folder.FINISHED).write_bytes(content)
    assert not run_folder.is_finished(folder, resumed(folder, finished), finished)
    run_folder.mark_finished(folder, 6)
    assert run_folder.is_finished(folder, resumed(folder, finished), finished)


def test_a_run_whose_last_checkpoint_is_lost_is_not_finished(folder, finished):
    shutil.rmtree(folder / inventory.FOLDER / "6")
    past = resumed(folder, finished)
    assert past.step == 4
    assert not run_folder.is_finished(folder, past, finished)


def test_outputs_of_a_shorter_run_do_not_finish_a_longer_one(folder, finished):
    longer = small_folder.configuration(folder, train={"max_steps": 8})
    small_folder.save(folder, longer, 8)
    run_folder.record(folder, longer)
    assert not run_folder.is_finished(folder, resumed(folder, longer), longer)
    run_folder.mark_finished(folder, 8)
    assert run_folder.is_finished(folder, resumed(folder, longer), longer)


def test_the_configuration_is_on_the_disk_before_it_takes_the_old_one_s_place(folder, done):
    folder.mkdir()
    run_folder.record(folder, small_folder.configuration(folder))
    assert done[0] == done[1].removesuffix(f" -> {run_folder.CONFIG}")
    assert [path.name for path in folder.iterdir()] == [run_folder.CONFIG]


def test_an_old_run_goes_checkpoints_first_and_configuration_last(folder, finished, done):
    """A kill in between must leave nothing that looks like the new run's."""
    run_folder.put_aside(folder)
    moved = [entry.partition(" -> ")[0] for entry in done]
    assert (moved[0], moved[-1]) == (inventory.FOLDER, run_folder.CONFIG)
    assert len(moved) > 3


HARMLESS = {
    "train.logging_steps": 7,
    "train.eval_steps": 7,
    "train.save_steps": 7,
    "train.save_total_limit": 9,
    "train.max_bad_updates": 2,
    "train.per_device_train_batch_size": 2,
    "train.per_device_eval_batch_size": 3,
    "train.gradient_checkpointing": True,
    "train.max_steps": 60,
    "data.num_workers": 1,
    "data.prepared_dir": "elsewhere",
    "data.source": "/moved/cv",
    "data.cache_features": True,
    "model.attention": "xla",
    "model.remat_policy": "dots_saveable",
    "output_dir": "/moved/run",
    "train.early_stopping_patience": 3,
    "train.on_save_error": "continue",
    "train.zero_sharding": True,
}


def test_every_option_that_is_free_to_change_is_tried_below():
    assert HARMLESS.keys() - set(differences.LENGTHS) == differences.FREE_TO_CHANGE


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_change_goes_on_and_is_noted(folder, unfinished, name, caplog):
    changed = config.build(config.as_dict(unfinished), [f"--{name}={HARMLESS[name]}"])
    with caplog.at_level(logging.INFO, logger="flax_asr"):
        assert resumed(folder, changed).step == 4
    assert f"going on with {name} {HARMLESS[name]!r} (was " in caplog.text


def test_a_longer_run_extends_a_finished_one(folder, finished):
    for name, longer in {"max_steps": 7, "num_train_epochs": 9.0}.items():
        changed = small_folder.configuration(folder, train={name: longer})
        past = resumed(folder, changed)
        assert past.step == 6
        assert not run_folder.is_finished(folder, past, changed)


@pytest.mark.parametrize(
    "option",
    [
        "--seed=1",
        "--optim.learning_rate=1.0",
        "--optim.warmup_steps=3",
        "--train.max_steps=5",
        "--train.max_steps=null",
        "--train.num_train_epochs=1.0",
        "--train.global_batch_size=16",
        "--train.mixed_precision=fp32",
        "--train.metric_for_best_model=loss",
        "--data.language=br",
        "--data.train_splits=train,dev",
        "--data.eval_splits=[]",
        "--data.max_seconds=9",
        "--text.min_count=2",
        "--model.pretrained=other",
        "--model.config.layerdrop=0.1",
        "--model.freeze_feature_encoder=false",
    ],
)
def test_a_change_of_meaning_is_refused(folder, unfinished, option):
    changed = config.build(config.as_dict(unfinished), [option])
    with pytest.raises(errors.ConfigError) as refusal:
        resumed(folder, changed)
    name = option[2:].partition("=")[0]
    if name.startswith("model.config."):
        key = name.rpartition(".")[2]
        old, new = unfinished.model.config.get(key, "not set"), changed.model.config[key]
    else:
        old, new = config.flat(unfinished)[name], config.flat(changed)[name]
    assert f"  {name}: was {old!r}, now {new!r}\n" in str(refusal.value)


def test_a_refusal_names_every_difference_and_the_ways_out(folder, unfinished):
    changed = config.build(
        config.as_dict(unfinished),
        ["--seed=1", "--optim.learning_rate=1.0", "--train.save_steps=1"],
    )
    with pytest.raises(errors.ConfigError) as refusal:
        resumed(folder, changed)
    message = str(refusal.value)
    assert "seed: was 42, now 1" in message
    assert "optim.learning_rate: was 0.0003, now 1.0" in message
    assert "save_steps" not in message
    for way_out in ("another --output_dir", "--restart", f"--model.pretrained {folder}"):
        assert way_out in message
    assert resumed(folder, unfinished).step == 4


def test_every_option_is_free_or_guarded(folder, unfinished):
    """A name that the configuration does not have would guard nothing."""
    assert differences.FREE_TO_CHANGE | set(differences.LENGTHS) <= config.option_types().keys()


def test_restart_keeps_the_old_folder_whole(folder, unfinished):
    (folder / runlog.FILE).write_text('{"step": 1}\n')
    for of_a_score in ("predictions-dev.jsonl", "left_out-dev.jsonl"):
        (folder / of_a_score).write_text("{}\n")
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    changed = small_folder.configuration(folder, optim={"learning_rate": 1.0})
    with run_folder.owned(folder):
        assert resumed(folder, changed, restart=True) is None
        assert [p.name for p in folder.iterdir()] == [run_folder.LOCK]
    (kept,) = [p for p in folder.parent.iterdir() if p != folder]
    assert kept.name.startswith("run-20")
    assert before == {p.relative_to(kept): p.read_bytes() for p in kept.rglob("*") if p.is_file()}
    assert resumed(kept, unfinished).step == 4


def test_restart_leaves_what_no_run_wrote_where_it_is(folder, finished):
    (folder / "clips").mkdir()
    (folder / "train.tsv").write_text("path")
    with run_folder.owned(folder):
        assert resumed(folder, finished, restart=True) is None
    assert {p.name for p in folder.iterdir()} == {run_folder.LOCK, "clips", "train.tsv"}
    (kept,) = [p for p in folder.parent.iterdir() if p != folder]
    assert resumed(kept, finished).step == 6
    assert run_folder.is_finished(kept, resumed(kept, finished), finished)


def test_restart_in_a_folder_without_a_run_moves_nothing(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    assert resumed(folder, small_folder.configuration(folder), restart=True) is None
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", [run_folder.CARD, run_folder.CONFIG, run_folder.EXPORT])
@pytest.mark.parametrize("restart", [False, True])
def test_a_fresh_run_does_not_write_over_what_no_run_wrote(folder, name, restart):
    folder.mkdir()
    (folder / name).write_text("# mine\n")
    with pytest.raises(errors.CheckpointError, match=f"holds {name}, which no run wrote"):
        resumed(folder, small_folder.configuration(folder), restart)
    assert (folder / name).read_text() == "# mine\n"


def test_results_whose_checkpoints_are_gone_are_not_trained_over(folder, finished):
    shutil.rmtree(folder / inventory.FOLDER)
    with pytest.raises(errors.CheckpointError, match=r"README\.md .* no checkpoints.*--restart"):
        resumed(folder, finished)
    assert resumed(folder, finished, restart=True) is None


def test_restart_of_the_current_folder_keeps_the_old_run_beside_it(folder, unfinished, monkeypatch):
    monkeypatch.chdir(folder)
    assert resumed(pathlib.Path(), unfinished, restart=True) is None
    (kept,) = [p for p in folder.parent.iterdir() if p != folder]
    assert resumed(kept, unfinished).step == 4


def test_restart_through_a_link_keeps_the_old_run_beside_what_it_links_to(
    folder, unfinished, tmp_path
):
    link = tmp_path / "elsewhere" / "run"
    link.parent.mkdir()
    link.symlink_to(folder)
    assert resumed(link, unfinished, restart=True) is None
    assert [p.name for p in link.parent.iterdir()] == ["run"]
    (kept,) = [p for p in folder.parent.iterdir() if p.name.startswith("run-20")]
    assert resumed(kept, unfinished).step == 4


def test_a_run_that_cannot_be_put_aside_is_refused(folder, unfinished, monkeypatch):
    """As where the folder is itself a disk: nothing can be renamed to beside it."""

    def other_disk(path, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(pathlib.Path, "rename", other_disk)
    with pytest.raises(errors.CheckpointError, match=r"cannot be moved to .*run-20.*cross-device"):
        resumed(folder, unfinished, restart=True)
    assert [p.name for p in folder.parent.iterdir()] == ["run"]


def test_restart_in_an_empty_folder_leaves_nothing_beside(folder):
    with run_folder.owned(folder):
        assert resumed(folder, small_folder.configuration(folder), restart=True) is None
    assert [p.name for p in folder.parent.iterdir()] == ["run"]


def test_a_kill_in_mid_restart_leaves_no_checkpoint_behind(folder, unfinished, monkeypatch):
    """Whatever move is the last, a run without a configuration must not find old checkpoints."""
    (folder / ".compiled").mkdir()
    (folder / runlog.FILE).write_text("")
    moves = []
    rename = pathlib.Path.rename

    def killed(path, target):
        moves.append(path.name)
        if len(moves) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        resumed(folder, unfinished, restart=True)
    monkeypatch.undo()
    assert moves[0] == inventory.FOLDER
    assert resumed(folder, small_folder.configuration(folder, seed=1)) is None


def test_a_second_run_in_the_same_folder_is_refused(folder):
    hold = (
        "import pathlib, sys, time\nfrom flax_asr import run_folder\n"
        "with run_folder.owned(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(errors.CheckpointError, match=f"another run is at work in {folder}"):
            run_folder.owned(folder).__enter__()
        other.send_signal(signal.SIGKILL)
    # The file is still there; its lock went with the process.
    assert (folder / run_folder.LOCK).exists()
    with run_folder.owned(folder):
        pass


def test_the_folder_is_free_again_after_a_run(folder):
    with run_folder.owned(folder):
        pass
    with run_folder.owned(folder):
        pass


def test_an_output_dir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(errors.CheckpointError, match=f"cannot write in output_dir {path}"),
            run_folder.owned(path),
        ):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_output_dir_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with (
        pytest.raises(errors.CheckpointError, match="cannot write in output_dir"),
        run_folder.owned(tmp_path / "run"),
    ):
        pass


def test_other_clips_are_refused(folder, unfinished):
    past = resumed(folder, unfinished)
    differences.check_data(past, json.loads(json.dumps(small_folder.SPLITS)))
    newer = {"train": small_folder.SPLITS["train"] | {"hash": "ef" * 32, "release": "cv-10"}}
    with pytest.raises(errors.ConfigError) as refusal:
        differences.check_data(past, newer)
    message = str(refusal.value)
    assert "train: was 7 clips of cv-corpus-9 (abababababab), now 7 clips of cv-10 (efef" in message
    assert "eval: was 3 clips of cv-corpus-9 (cdcdcdcdcdcd), now not there" in message


def test_what_a_kill_left_half_written_is_swept(folder, unfinished):
    before = sorted(folder.rglob("*"))
    (folder / ".export.1a2b.unfinished" / "sub").mkdir(parents=True)
    (folder / ".export.1a2b.old").mkdir()
    (folder / ".config.yaml.unfinished").write_text("seed:")
    run_folder.sweep(folder)
    assert sorted(folder.rglob("*")) == before
