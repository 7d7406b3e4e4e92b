"""Whole runs of the command line: what they leave, and what stopping them at any moment costs."""

import errno
import fnmatch
import json
import os
import pathlib
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
import small_training
import soundfile

from flax_asr import __main__, checkpoint, evaluate, export, inventory, loop, parallel, seals
from flax_asr.hosts import stopping
from flax_asr.record import runlog

RUN_FILES = {
    "config.yaml",
    "log.jsonl",
    "README.md",
    "curves.png",
    "predictions-eval.jsonl",
    "predictions-test.jsonl",
    "left_out.jsonl",
    "export/README.md",
    "export/config.json",
    "export/model.safetensors",
    "export/vocab.json",
    "export/tokenizer_config.json",
    "export/preprocessor_config.json",
    "export/flax_asr.json",
}
LOGGED = (
    "step epoch loss learning_rate grad_norm loss_scale skipped_steps infeasible_clips"
    " blank_fraction padding audio_seconds_per_second data_wait_seconds time phase compilations"
    " failed_saves"
).split()
EXPECTED = "step epoch expected_first_loss plateau_loss unigram_entropy".split()
SCORED = (
    "loss wer cer clips cer_low cer_high wer_low wer_high infeasible_clips blank_fraction"
    " release hash rule"
).split()


def test_a_run_leaves_every_file(whole):
    there = {p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file()}
    assert there >= RUN_FILES
    assert [p.name for p in whole.iterdir() if "unfinished" in p.name] == []
    assert inventory.steps(whole)[0] == small_training.UPDATES


def test_everything_in_a_run_folder_is_in_the_readme(whole):
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = text.partition("| in `output_dir` |")[2].partition("\n\n")[0]
    named = re.findall(r"`([^`]+?)/?`", "".join(re.findall(r"^\|[^|]*\|", table, re.MULTILINE)))
    there = [path.name for path in whole.iterdir() if not path.name.startswith(".")]
    unnamed = [name for name in there if not any(fnmatch.fnmatch(name, n) for n in named)]
    assert (len(named) >= 8, unnamed) == (True, [])


def test_the_log_has_these_keys_and_no_others(whole):
    kinds = {"loss": LOGGED, "plateau_loss": EXPECTED}
    kinds["eval_loss"] = ["step", "epoch", *(f"eval_{name}" for name in SCORED)]
    kinds["test_loss"] = ["step", "best_step", *(f"test_{name}" for name in SCORED)]
    found = {name: [] for name in kinds}
    for event in runlog.read(whole):
        (kind,) = kinds.keys() & event.keys()
        assert list(event) == kinds[kind]
        found[kind].append(event["step"])
    assert found == {
        "plateau_loss": [0],
        "loss": [2, 4, 6, 8],
        "eval_loss": [4, 8],
        "test_loss": [8],
    }


def test_the_output_says_what_a_reader_must_know(whole):
    output = whole.with_name("whole.txt").read_text(encoding="utf-8")
    (scored,) = (event for event in runlog.read(whole) if "best_step" in event)
    for words in (
        "8 updates of 8 clips, 2 an epoch",
        "there are no normalisation rules for cy",
        f"{scored['test_release']}, {scored['test_hash'][:16]}; greedy, real frames only; CER",
    ):
        assert words in output
    assert re.search(
        r"step 2: (before|on|left) the blank plateau|step 2: (learn|diverg)ing", output
    )


def test_nothing_is_compiled_after_the_warm_up(whole):
    assert [e["compilations"] for e in runlog.read(whole) if "compilations" in e] == [0] * 4


def test_the_loss_falls(whole):
    losses = [event["loss"] for event in runlog.read(whole) if "loss" in event]
    assert losses[-1] < losses[0]


def test_the_best_score_of_the_log_is_that_of_the_checkpoints(whole):
    best = min((e for e in runlog.read(whole) if "eval_cer" in e), key=lambda e: e["eval_cer"])
    model = checkpoint.load_model(whole)
    assert model.step == best["step"] == runlog.read(whole)[-1]["best_step"]
    assert model.metrics["eval_cer"] == best["eval_cer"]


def test_the_card_has_the_scores(whole):
    card = (whole / "README.md").read_text()
    tested = runlog.read(whole)[-1]
    assert f"{tested['test_cer']:.4f}" in card
    assert "curves.png" in card
    exported = (whole / "export" / "README.md").read_text()
    assert f"{tested['test_cer']:.4f}" in exported
    assert exported.startswith("---\n")
    assert "# whole\n" in exported
    assert "The folder" not in exported
    assert "curves.png" not in exported


def test_an_export_of_an_earlier_checkpoint_has_a_card_without_the_test_scores(whole, tmp_path):
    best = checkpoint.load_model(whole).step
    other = next(step for step in inventory.steps(whole) if step != best)
    assert __main__.main(["export", str(whole), str(tmp_path / "out"), "--step", str(other)]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- This checkpoint: after {other} updates" in card
    assert "results on the test set" not in card


def test_the_export_says_the_same_in_pytorch(place, whole):
    import torch
    import transformers

    export = whole / "export"
    model = transformers.Wav2Vec2ForCTC.from_pretrained(export).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(export)
    lines = (whole / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == small_training.CLIPS["test"]
    for line in map(json.loads, lines):
        audio, rate = soundfile.read(place.source / "cy" / "clips" / line["id"])
        inputs = extractor(audio, sampling_rate=rate, return_tensors="pt")
        with torch.inference_mode():
            ids = model(**inputs).logits.argmax(-1)[0]
        # The unknown symbol too, which a model this young says now and then.
        assert tokenizer.decode(ids) == line["hypothesis"]


def test_the_same_command_again_says_finished_and_writes_nothing(place, whole, tmp_path):
    run = pathlib.Path(shutil.copytree(whole, tmp_path / "run"))
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"}
    assert "is finished: 8 updates" in place.finish(run)
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"}


def test_a_changed_learning_rate_is_refused(place, whole, tmp_path):
    run = pathlib.Path(shutil.copytree(whole, tmp_path / "run"))
    process = place.start(run, "--optim.learning_rate=1e-3")
    assert process.end() == 2
    assert "optim.learning_rate: was 0.01, now 0.001" in process.output
    assert "Traceback" not in process.output


def test_a_lost_export_is_written_again(place, whole, tmp_path):
    run = pathlib.Path(shutil.copytree(whole, tmp_path / "run"))
    weights = (run / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "export")
    place.finish(run)
    assert (run / "export" / "model.safetensors").read_bytes() == weights
    small_training.assert_same(run, whole)


def test_another_number_of_devices_and_more_updates_go_on(place, tmp_path):
    run = tmp_path / "run"
    alone = ("--train.max_steps=4", "--train.per_device_train_batch_size=4")
    place.finish(run, *alone, devices=1)
    output = place.finish(run)
    assert "going on with train.max_steps 8 (was 4)" in output
    assert "going on after update 4" in output
    assert [e["step"] for e in runlog.read(run) if "loss" in e] == [2, 4, 6, 8]
    # The log of an extended run is that of a longer run.
    assert [e["step"] for e in runlog.read(run) if "best_step" in e] == [8]
    assert inventory.read_meta(run, 8).group_rows == 4
    card = (run / "README.md").read_text()
    assert "made longer after update 4, when 4 were planned" in card
    assert "- training_steps: 8" in card
    assert "is finished: 8 updates" in place.finish(run)


def test_a_finished_run_is_fine_tuned_further_and_its_card_tells(here, whole, tmp_path):
    run = tmp_path / "run"
    assert here(run, f"--model.pretrained={whole}", "--train.max_steps=2") == 0
    best = checkpoint.load_model(whole).step
    card = (run / "README.md").read_text()
    assert (
        f"- Before, 1: from random weights, {best} updates on cv-corpus-1 cy; head: fresh" in card
    )
    assert "- Started from: whole; head: kept" in card
    facts = json.loads((run / "export" / "flax_asr.json").read_text())
    assert [ancestor["updates"] for ancestor in facts["lineage"]] == [best]
    # A head that knows something has no first loss to expect.
    assert "expected_first_loss" not in runlog.read(run)[0]


def killed(place, whole, run, rng, kills: int) -> int:
    """Kills a run at random moments, then lets it end; gives how many kills hit."""
    times = [event["time"] for event in runlog.read(whole) if "time" in event]
    seconds = 2 * (times[-1] - times[0])
    hits = 0
    for _ in range(kills):
        process = place.start(run)
        if process.wait_until_compiled():
            time.sleep(rng.uniform(0, seconds))
        hits += process.alive
        process.kill()
    place.finish(run)
    return hits


def test_kills_at_random_moments_change_nothing(place, whole, tmp_path):
    run = tmp_path / "run"
    assert killed(place, whole, run, np.random.default_rng(1), kills=3) > 0
    small_training.assert_same(run, whole)
    assert inventory.steps(run) == inventory.steps(whole)
    assert [p for p in run.rglob(".*") if "unfinished" in p.name] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_many_kills_at_random_moments_change_nothing(place, whole, tmp_path, seed):
    run = tmp_path / "run"
    killed(place, whole, run, np.random.default_rng(seed), kills=6)
    small_training.assert_same(run, whole)


def test_a_kill_in_mid_save_changes_nothing(place, whole, tmp_path):
    run = tmp_path / "run"
    process = place.start(run)
    process.wait_for(lambda: any((run / inventory.FOLDER).glob(".unfinished-*")))
    process.kill()
    place.finish(run)
    small_training.assert_same(run, whole)


def test_sigterm_saves_and_the_same_command_goes_on(place, whole, tmp_path):
    run = tmp_path / "run"
    process = place.start(run)
    process.wait_for(lambda: len(runlog.read(run)) > 1)
    process.signal(signal.SIGTERM)
    assert process.end() == 75
    assert "SIGTERM: finishing this update, then saving." in process.output
    (newest, *_) = inventory.steps(run)
    assert f"stopped after update {newest}; everything is saved in {run}" in process.output
    assert f"going on after update {newest}" in place.finish(run)
    small_training.assert_same(run, whole)


def test_sigterm_while_compiling_ends_at_once_and_leaves_a_fresh_start(place, tmp_path):
    run = tmp_path / "run"
    process = place.start(run, cache=tmp_path / "cold")
    process.wait_for(lambda: "programs to compile" in process.output)
    process.signal(signal.SIGTERM)
    assert process.end(seconds=10) == 75
    assert "SIGTERM: stopped. Run the same command to go on." in process.output
    assert "finishing this update" not in process.output
    # Nothing was done yet that another configuration could spoil.
    place.finish(run, "--seed=1", "--train.max_steps=2")
    assert inventory.steps(run)[0] == 2


@pytest.mark.slow
def test_sigterm_while_finishing_ends_at_once_and_the_same_command_finishes(place, whole, tmp_path):
    run = tmp_path / "run"
    process = place.start(run)
    process.wait_for(lambda: any("best_step" in event for event in runlog.read(run)))
    process.signal(signal.SIGINT)
    assert process.end(seconds=10) == 75
    assert "finishing this update" not in process.output
    place.finish(run)
    small_training.assert_same(run, whole)
    for path in (whole / "export").iterdir():
        expected = path.read_bytes()
        if path.name == "README.md":  # which has the name of its run
            expected = expected.replace(b"name: whole\n", b"name: run\n")
            expected = expected.replace(b"# whole\n", b"# run\n")
        assert (run / "export" / path.name).read_bytes() == expected


@pytest.fixture
def here(place, monkeypatch):
    """Runs in this process, which stays as it was, with the compiled programs of the others."""
    monkeypatch.setattr(export, "_torch_is_installed", None)
    small_training.without_torch()

    def run(folder, *more):
        before = small_training.process()
        status = __main__.main(place.command(folder, *more))
        assert not small_training.changed(before)
        return status

    return run


def test_an_evaluation_broken_off_is_made_up_for(here, place, whole, tmp_path, monkeypatch):
    """A preempted machine does not wait for the end of an evaluation."""
    run, stops = tmp_path / "run", []
    score, enter = evaluate.score, stopping.Stop.__enter__

    def entered(stop):
        stops.append(stop)
        return enter(stop)

    def asked(*arguments, **options):
        stops[-1].asked = True
        return score(*arguments, **options)

    monkeypatch.setattr(stopping.Stop, "__enter__", entered)
    monkeypatch.setattr(evaluate, "score", asked)
    assert here(run) == 75
    assert inventory.steps(run)[0] == 4
    assert not any("eval_loss" in event for event in runlog.read(run))
    monkeypatch.setattr(evaluate, "score", score)
    assert here(run) == 0
    small_training.assert_same(run, whole)


@pytest.mark.parametrize("reads", [1, 2, 3, 4])
def test_whenever_the_signal_comes_the_step_is_saved(here, tmp_path, monkeypatch, capsys, reads):
    """As if it came between any two looks at it."""
    run, left = tmp_path / "run", iter(range(reads))

    class Stop(stopping.Stop):
        asked = property(lambda self: next(left, None) is None, lambda self, value: None)

    monkeypatch.setattr(stopping, "Stop", Stop)
    assert here(run, "--data.eval_splits=[]", "--data.test_splits=[]") == 75
    said = re.search(r"stopped after update (\d+); everything is saved", capsys.readouterr().err)
    assert inventory.steps(run)[0] == int(said[1])


def test_bad_numbers_are_skipped_counted_and_in_a_row_stop_the_run(
    here, place, tmp_path, monkeypatch, capsys
):
    run, calls = tmp_path / "run", []
    micro_batches = parallel.Devices.micro_batches
    bad = {4, 12, 13, 14, 15}  # of two groups an update: updates 3 and 7, 8

    def spoilt(devices, batch, per_device):
        if batch.audio.shape[0] == 4 and len(calls) in bad:
            batch = batch._replace(gains=np.full_like(batch.gains, np.nan))
        calls.append(batch)
        return micro_batches(devices, batch, per_device)

    monkeypatch.setattr(parallel.Devices, "micro_batches", spoilt)
    options = ("--train.max_bad_updates=2", "--data.eval_splits=[]", "--data.test_splits=[]")
    assert here(run, *options) == 2
    message = capsys.readouterr().err
    assert "2 updates in a row had a gradient that is not finite; the last finite one" in message
    found = re.search(r"at step 6: loss (\S+), gradient norm (\S+)\. The last bad one", message)
    assert all(0 < float(figure) < np.inf for figure in found.groups())
    named = re.search(r"was step 8 with the clips (.*?)\. The weights", message)[1].split(", ")
    assert len({clip for clip in named if clip.startswith("common_voice_cy_")}) == 8
    events = [event for event in runlog.read(run) if "loss" in event]
    assert [event["skipped_steps"] for event in events] == [0, 1, 1]
    saved = checkpoint.load_model(run)
    assert saved.step == 6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved.params))


KNOBS = (
    "--optim.ema_decay=0.7",
    "--optim.head_learning_rate=2e-2",
    "--model.freeze_encoder_steps=5",
    "--data.augment.speed=0.9,1.1",
    "--data.augment.gain_db=[-6, 6]",
    "--data.augment.noise_snr_db=10,30",
)


def test_a_run_whose_scores_stay_the_same_stops_early_and_goes_on_with_more_patience(
    here, tmp_path, caplog
):
    run = tmp_path / "run"
    caplog.set_level("INFO")
    # A model that does not move scores the same every time.
    options = ("--optim.learning_rate=1e-30", "--train.eval_steps=1", "--data.test_splits=dev")

    def evaluated():
        return [event["step"] for event in runlog.read(run) if "eval_cer" in event]

    assert here(run, *options, "--train.early_stopping_patience=2") == 0
    assert inventory.steps(run) == [3, 1]  # the second score was no better than the first
    assert evaluated() == [1, 2, 3]
    assert runlog.read(run)[-1]["best_step"] == 1
    card = (run / "README.md").read_text()
    assert "Training stopped early, after update 3 of 8" in card
    assert (run / "export" / "config.json").is_file()

    caplog.clear()
    assert here(run, *options, "--train.early_stopping_patience=2") == 0
    assert "is finished: 3 updates" in caplog.text

    # Killed when the last step was saved and nothing finished yet.
    shutil.rmtree(run / "export")
    assert here(run, *options, "--train.early_stopping_patience=2") == 0
    assert evaluated() == [1, 2, 3]
    assert (run / "README.md").read_text() == card

    assert here(run, *options, "--train.early_stopping_patience=5") == 0
    assert evaluated() == [1, 2, 3, 4, 5, 6]
    assert "after update 6 of 8" in (run / "README.md").read_text()
    assert [e["step"] for e in runlog.read(run) if "stopped_early_after" in e] == [6]


@pytest.mark.slow
def test_with_every_knob_turned_a_stop_changes_nothing(here, place, tmp_path, monkeypatch):
    run, cut, uninterrupted = tmp_path / "run", tmp_path / "cut", tmp_path / "uninterrupted"
    assert here(uninterrupted, *KNOBS) == 0
    for folder, more in {run: (), cut: ("--train.zero_sharding=true",)}.items():
        left = iter(range(6))

        class Stop(stopping.Stop):
            asked = property(
                lambda self, left=left: next(left, None) is None, lambda self, value: None
            )

        with monkeypatch.context() as patched:
            patched.setattr(stopping, "Stop", Stop)
            assert here(folder, *KNOBS) == 75
        assert 0 < inventory.steps(folder)[0] < small_training.UPDATES
        assert here(folder, *KNOBS, *more) == 0
    small_training.assert_same(run, uninterrupted)
    assert {e["compilations"] for e in runlog.read(run) if "compilations" in e} == {0}

    # With moments and average cut from the stop on, the same but for rounding.
    for ours, theirs in zip(*map(small_training.log, (cut, uninterrupted)), strict=True):
        assert ours.keys() == theirs.keys()
        numbers = {name: value for name, value in theirs.items() if isinstance(value, (int, float))}
        assert {name: ours[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)
    exports = [folder / "export" / "model.safetensors" for folder in (cut, uninterrupted)]
    ours, theirs = map(safetensors.numpy.load_file, exports)
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], atol=1e-5, err_msg=name)

    # The average is what is scored and exported.
    scored = [event for event in runlog.read(run) if "eval_cer" in event or "test_cer" in event]
    assert len(scored) == 3
    assert {event["weights"] for event in scored} == {"average"}
    best = small_training.state(run, scored[-1]["best_step"])
    exported = safetensors.numpy.load_file(run / "export" / "model.safetensors")
    for name, same in {"average": True, "trainable": False}.items():
        kernel = best[f"{name}/lm_head/kernel"]
        assert (exported["lm_head.weight"].T.tobytes() == kernel) == same


def no_room(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_in_mid_run_stops_it_or_costs_one_checkpoint(
    here, whole, tmp_path, monkeypatch, capsys, caplog, policy
):
    run, write, score_and_save = tmp_path / "run", seals.write, loop.Run._score_and_save

    def full_at_6(folder):
        (no_room if folder.name.endswith("-6") else write)(folder)

    def published(training):
        try:
            return score_and_save(training)
        finally:
            if training.checkpoints._publishing is not None:
                training.checkpoints._publishing.join()

    monkeypatch.setattr(seals, "write", full_at_6)
    monkeypatch.setattr(loop.Run, "_score_and_save", published)
    status = here(run, f"--train.on_save_error={policy}")
    message = capsys.readouterr().err + caplog.text
    assert "No space left on device. Make room or fix the folder" in message
    assert "Checkpoints there: 4, 3." in message
    if policy == "stop":
        assert status == 2
        assert inventory.steps(run) == [4, 3]
        monkeypatch.setattr(seals, "write", write)
        assert here(run) == 0
        small_training.assert_same(run, whole)
    else:
        assert status == 0
        assert "the run goes on" in message
        assert inventory.steps(run) == [8, 4]
        assert small_training.state(run, 8) == small_training.state(whole, 8)
        counts = [e["failed_saves"] for e in runlog.read(run) if "failed_saves" in e]
        assert counts == [0, 0, 0, 1]
        everything = [event | {"failed_saves": 0} for event in small_training.log(run)]
        assert everything == [event | {"failed_saves": 0} for event in small_training.log(whole)]


def test_a_folder_that_vanishes_for_a_while_costs_what_was_to_be_written_then(
    here, tmp_path, monkeypatch
):
    run, score_and_save = tmp_path / "run", loop.Run._score_and_save

    def away_from_3_to_6(training):
        if training.step == 6:
            run.with_name("away").rename(run)
        try:
            return score_and_save(training)
        finally:
            if training.step == 3:
                training.checkpoints.wait()
                run.rename(run.with_name("away"))

    monkeypatch.setattr(loop.Run, "_score_and_save", away_from_3_to_6)
    assert here(run, "--train.on_save_error=continue") == 0
    assert inventory.steps(run) == [8, 6]
    events = runlog.read(run)
    assert [event["step"] for event in events if "loss" in event] == [2, 4, 6, 8]
    assert [event["failed_saves"] for event in events if "loss" in event] == [0, 0, 2, 3]
    assert [event["step"] for event in events if "eval_cer" in event] == [8]


def test_the_last_save_must_succeed(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(seals, "write", no_room)
    options = ("--train.on_save_error=continue", "--data.eval_splits=[]", "--data.test_splits=[]")
    assert here(tmp_path / "run", *options) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "options",
    [
        ("--data.eval_splits=[]",),
        ("--data.test_splits=[]",),
        ("--data.eval_splits=test", "--data.test_splits=test"),
    ],
)
def test_any_choice_of_splits_ends(here, tmp_path, options):
    run = tmp_path / "run"
    assert here(run, *options, "--train.max_steps=4") == 0
    events = runlog.read(run)
    assert any("eval_cer" in event for event in events) == ("--data.eval_splits=[]" not in options)
    assert any("test_cer" in event for event in events) == ("--data.test_splits=[]" not in options)
    card = (run / "README.md").read_text()
    assert ("**The test score is too good**" in card) == ("--data.eval_splits=test" in options)
    assert (run / "export" / "config.json").is_file()
    assert here(run, *options, "--train.max_steps=4") == 0


def test_other_data_behind_the_same_path_are_refused(here, place, whole, tmp_path, capsys):
    run = pathlib.Path(shutil.copytree(whole, tmp_path / "run"))
    other = small_training.corpus(tmp_path / "other")
    table = other / "cy" / "train.tsv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    moved = (f"--data.source={other}", f"--data.prepared_dir={tmp_path / 'prepared'}")
    assert here(run, *moved, "--train.max_steps=9") == 2
    message = capsys.readouterr().err
    assert "the data are not those that this run began with" in message
    assert "train: was 16 clips" in message
    assert "now 15 clips" in message


def test_a_flipped_bit_in_prepared_audio_stops_the_run_before_anything_is_saved(
    here, whole, tmp_path, capsys
):
    run, prepared = tmp_path / "run", tmp_path / "prepared"
    shutil.copytree(whole.parent / "prepared", prepared)
    (audio,) = (prepared / "dev").glob("audio-*")
    content = bytearray(audio.read_bytes())
    content[100] ^= 1
    audio.write_bytes(content)
    assert here(run, f"--data.prepared_dir={prepared}") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"{audio} is not what was written: its sha256 differs" in message
    assert f"Delete the folder {audio.parent}" in message
    assert inventory.steps(run) == []
    shutil.rmtree(audio.parent)
    assert here(run, f"--data.prepared_dir={prepared}") == 0
    small_training.assert_same(run, whole)


def test_a_run_that_another_process_is_at_is_refused(place, tmp_path, here, capsys):
    run = tmp_path / "run"
    process = place.start(run, cache=tmp_path / "cold")
    process.wait_for(lambda: "programs to compile" in process.output)
    assert here(run) == 2
    assert f"another run is at work in {run}" in capsys.readouterr().err
    process.kill()


def test_the_status_of_an_interruption_is_written_once_for_both_ways_out():
    assert __main__.INTERRUPTED == stopping.STATUS
