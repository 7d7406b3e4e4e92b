"""The doctor sees every fault that is planted, forecasts what really comes, and goes on."""

import dataclasses
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import soundfile
from transformers import Wav2Vec2Config

from flax_asr import __main__, assembly, audio, config, ctc, doctor, errors, parallel
from flax_asr.data import pool, prepare
from flax_asr.diagnosis import consultation, findings, host, spectrograms, survey, trial
from flax_asr.estimate import forecast

ROOT = pathlib.Path(__file__).parents[1]
CORPUS = ROOT / "configs" / "quickstart" / "corpus"
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8, 8, 8],
    "num_feat_extract_layers": 3,
    "conv_kernel": [32, 8, 4],
    "conv_stride": [16, 5, 4],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
MACHINE = trial.Machine("cpu", "cpu", 2, None, 1e11)
TIMED = trial.Timed(0.5, 0.1, 3.0, 10**6, 2)


def _release(folder: pathlib.Path, **splits: list[tuple]) -> pathlib.Path:
    """A release of noise: each clip is (name, speaker, sentence, seconds)."""
    language = folder / "cv-corpus-1.0" / "cy"
    (language / "clips").mkdir(parents=True)
    for split, clips in splits.items():
        rows = ["client_id\tpath\tsentence"]
        for number, (name, speaker, sentence, seconds) in enumerate(clips):
            rows.append(f"{speaker}\t{name}.wav\t{sentence}")
            rng = np.random.default_rng([number, len(split)])
            noise = rng.normal(0, 0.1, round(seconds * 16_000))
            if seconds:
                soundfile.write(language / "clips" / f"{name}.wav", noise, 16_000)
        (language / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return language


def _sound(split: str, count: int) -> list[tuple]:
    words = ["un dau tri", "pedwar pump", "chwech saith wyth", "naw deg un"]
    return [
        (f"{split}{i}", f"{split} speaker {i % 3}", f"{words[i % 4]} {split}", 1 + i % 5 / 4)
        for i in range(count)
    ]


def _config(folder: pathlib.Path, source: pathlib.Path, **sections) -> config.Config:
    train = {"num_train_epochs": 100, "global_batch_size": 4, "per_device_train_batch_size": 2}
    values = {
        "output_dir": str(folder / "run"),
        "data": {"source": str(source), "language": "cy", "num_workers": 1, "num_buckets": 2},
        "model": {"config": TINY},
        "text": {},
        "optim": {"warmup_steps": 10},
        "train": train | {"mixed_precision": "fp32", "eval_steps": 10},
    }
    for name, section in sections.items():
        values[name] = values[name] | section
    return config.build(values)


@pytest.fixture
def no_trial(monkeypatch):
    """The devices and times of another machine, at once; settable."""
    answers = {"devices": MACHINE, "timed": TIMED, "asked": []}

    def run(asked, limit_seconds):
        answers["asked"].append(asked)
        return answers["devices"], answers["timed"] if asked is not None else None

    monkeypatch.setattr(trial, "run", run)
    return answers


def _examined(cfg: config.Config) -> tuple[doctor.Examination, dict[str, findings.Finding]]:
    examination = doctor.Examination(cfg)
    examination.examine()
    return examination, {found.name: found for found in examination.findings}


# Every planted fault is found


@pytest.fixture
def faulty(tmp_path):
    train = _sound("train", 12)
    train[3] = ("html", "train speaker 0", "gwefan yw hwn", 1)
    train[4] = ("absent", "train speaker 1", "nid yw yma", 0)
    train[5] = ("mute", "train speaker 2", " ", 1)
    train[6] = ("quick", "train speaker 0", "llawer gormod o eiriau " * 6, 0.4)
    train[7] = ("marks", "train speaker 0", "?!", 1)
    train[8] = ("again", "train speaker 2", "yr un sain eto", 1)
    train[9] = ("train0", "train speaker 1", "yr un clip eto", 1)
    test = _sound("test", 5)
    test[0] = ("test0", "train speaker 1", "un dau tri test", 1)
    test[1] = ("test1", "test speaker 1", train[0][2], 1)
    test[2] = ("twin", "test speaker 2", "efeilliaid", 1)
    test[3] = ("test3", "test speaker 0", "qqqq", 1.5)
    source = _release(tmp_path, train=train, dev=_sound("dev", 4), test=test)
    (source / "clips" / "html.wav").write_text("<html>not found</html>")
    shutil.copy(source / "clips" / "train1.wav", source / "clips" / "twin.wav")
    shutil.copy(source / "clips" / "train2.wav", source / "clips" / "again.wav")
    return source


def test_every_planted_fault_is_found(faulty, tmp_path, no_trial):
    examination, found = _examined(_config(tmp_path, faulty, optim={"warmup_steps": 60}))
    assert examination.facts["splits"]["train"]["left_out"] == {
        "damaged": 1,
        "missing": 1,
        "empty_transcript": 1,
        "same_audio": 1,
        "duplicate": 1,
    }
    assert "again.wav as train2.wav" in found["same_audio"].message
    assert found["damaged"].cost == found["missing"].cost
    assert "html.wav" in found["damaged"].message
    shared = examination.facts["shared_with_train"]
    assert shared["test"] == {"clips": 0, "speakers": 1, "sentences": 1, "audio": 1}
    assert shared["dev"] == dict.fromkeys(shared["dev"], 0)
    assert found["shared_audio"].cost == 1 / 5
    assert "quick.wav" in found["label_too_long"].message
    empty = [f.message for f in examination.findings if f.name == "empty_transcript"]
    assert sorted(message.rpartition(": ")[2].split(".wav")[0] for message in empty) == [
        "marks",
        "mute",
    ]
    assert found["unknown_characters"].message.startswith("4 of ")
    updates = examination.facts["batches"]["updates"]
    assert f"60 of {updates}" in found["warmup"].message
    assert not any(finding.fatal for finding in examination.findings)
    text = consultation.report(examination.facts, examination.findings)
    assert all(finding.message in text for finding in examination.findings)
    assert "(1 micro-batch each);" in text
    examination.facts["batches"]["micro_batches_an_update"] = 2
    text = consultation.report(examination.facts, examination.findings)
    assert "(2 micro-batches each);" in text


def test_a_clean_corpus_has_no_finding_about_data(tmp_path, no_trial):
    source = _release(tmp_path, **{s: _sound(s, 8) for s in ("train", "dev", "test")})

    cfg = _config(
        tmp_path,
        source,
        text={"normalization": ["lower"]},
        train={"num_train_epochs": 200},
    )
    _, found = _examined(cfg)
    assert found.keys() <= {"unknown_characters", "padding"}


def test_doctor_writes_nothing_to_the_disk(faulty, tmp_path, no_trial):
    before = sorted(tmp_path.rglob("*"))
    _examined(_config(tmp_path, faulty))
    assert sorted(tmp_path.rglob("*")) == before


def _odd(tmp_path: pathlib.Path) -> pathlib.Path:
    train = _sound("train", 12)
    train[4] = ("long", "train speaker 1", "un", 6)
    train[5] = ("$x^2", "train speaker 2", "llawer o eiriau mewn dim o amser a mwy eto", 1)
    return _release(tmp_path, train=train, dev=_sound("dev", 4))


def test_clips_that_do_not_go_with_their_text_are_suspect(tmp_path, no_trial):
    cfg = _config(tmp_path, _odd(tmp_path), data={"test_splits": []})
    before, _ = _examined(cfg)
    (suspect,) = before.facts["suspects"]
    assert suspect["id"] == "long.wav"
    assert (suspect["seconds"], suspect["tokens"]) == (6, 2)
    assert suspect["times_usual"] > 4
    assert "suspect: long.wav has 2 characters in 6.0 s" in consultation.report(before.facts, [])


def test_the_oddest_clips_are_drawn_from_source_and_prepared_data_alike(tmp_path, no_trial):
    cfg = _config(tmp_path, _odd(tmp_path), data={"test_splits": []})
    drawn = []
    for folder in ("before", "after"):
        examination = doctor.Examination(cfg, str(tmp_path / folder))
        examination.examine()
        paths = [pathlib.Path(path) for path in examination.facts["spectrograms"]]
        assert sorted(paths) == sorted((tmp_path / folder).iterdir())
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
        drawn.append([path.name for path in paths])
        prepare.prepare(cfg)
    assert drawn[0] == drawn[1]
    assert drawn[0][0] == "01-long.wav.png"
    assert len(drawn[0]) == 8


def test_a_spectrogram_has_a_tone_in_its_band_and_stays_in_its_folder(tmp_path):
    time = np.arange(16_000) / 16_000
    tone = np.where(time < 0.5, 0.1 * np.sin(2 * np.pi * 1000 * time), 0).astype(np.float32)
    found = audio.mel_decibels(tone)
    centres = librosa.mel_frequencies(82, fmax=8000)[1:-1]
    assert abs(centres[found[:, 25].argmax()] - 1000) < 50
    assert found[:, 25].max() == pytest.approx(0, abs=0.5)
    assert found[:, 75].max() == -80
    clip = "../" * 40 + "a\x1b\0.wav"
    (path,) = spectrograms.draw(tmp_path / "pictures", [(clip, "said", tone)])
    assert path.parent == tmp_path / "pictures"
    assert path.is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.ConfigError, match="file cannot be written"):
        spectrograms.draw(tmp_path / "file", [])


# The forecast is what comes


def test_what_is_said_before_preparation_is_what_training_meets(faulty, tmp_path, no_trial):
    cfg = _config(tmp_path, faulty)
    before, _ = _examined(cfg)
    assert "sample" in {split["lengths_from"] for split in before.facts["splits"].values()}
    prepare.prepare(cfg)
    after, _ = _examined(cfg)
    assert {s["lengths_from"] for s in after.facts["splits"].values()} == {"prepared"}
    for part in ("durations", "label_lengths", "losses", "shapes", "batches"):
        assert json.dumps(after.facts[part]) == json.dumps(before.facts[part]), part
    resolved = dataclasses.replace(
        cfg, train=dataclasses.replace(cfg.train, gradient_accumulation_steps=None)
    )
    made = assembly.Assembly(resolved, parallel.Devices(jax.devices()[:2]), None)
    facts = after.facts
    assert [shape["samples"] for shape in facts["shapes"]] == list(made.train_shapes.samples)
    assert [shape["tokens"] for shape in facts["shapes"]] == list(made.train_shapes.tokens)
    assert facts["batches"]["updates"] == made.updates
    assert facts["batches"]["padding"] == made.plan.padding
    assert facts["batches"]["train_clips"] == len(made.corpus.train)
    assert facts["text"]["vocabulary"] == made.corpus.vocabulary.size
    state = jax.tree.leaves(made.state_shapes())
    assert facts["room"]["checkpoint_bytes"] == sum(
        leaf.size * leaf.dtype.itemsize for leaf in state
    )


def test_a_sample_stands_for_the_whole(tmp_path, no_trial, monkeypatch):
    source = _release(tmp_path, train=_sound("train", 40), dev=_sound("dev", 4))
    cfg = _config(tmp_path, source, data={"test_splits": []})
    whole, _ = _examined(cfg)
    monkeypatch.setattr(survey, "MOST_HEARD", 20)
    part, _ = _examined(cfg)
    assert part.facts["splits"]["train"]["decoded"] == 10
    assert whole.facts["splits"]["train"]["decoded"] == 40
    for name in ("train_clips", "updates"):
        assert part.facts["batches"][name] == whole.facts["batches"][name]
    hours = whole.facts["batches"]["train_hours"]
    assert part.facts["batches"]["train_hours"] == pytest.approx(hours, rel=0.1)
    assert part.facts["text"]["characters"] == whole.facts["text"]["characters"]


def test_some_rows_stand_for_very_many(tmp_path, no_trial, monkeypatch):
    source = _release(tmp_path, train=_sound("train", 40), dev=_sound("dev", 4))
    cfg = _config(tmp_path, source, data={"test_splits": []})
    monkeypatch.setattr(survey, "MOST_ROWS", 10)
    examination, _ = _examined(cfg)
    assert sum(examination.facts["durations"]["clips"]) == 10
    assert examination.facts["batches"]["train_clips"] == 40


def test_a_source_that_takes_too_long_is_read_in_part_and_that_is_said(
    tmp_path, no_trial, monkeypatch
):
    source = _release(tmp_path, train=_sound("train", 12), dev=_sound("dev", 4))
    monkeypatch.setattr(doctor, "READ_SECONDS", 0.0)
    examination, found = _examined(_config(tmp_path, source, data={"test_splits": []}))
    assert not examination.facts["splits"]["train"]["complete"]
    assert "unpack the archive" in found["incomplete"].message


def test_lengths_come_from_the_release_where_it_has_them(tmp_path, no_trial, monkeypatch):
    source = _release(tmp_path, train=_sound("train", 12), dev=_sound("dev", 4))
    rows = [f"{name}.wav\t{round(seconds * 1000)}" for name, _, _, seconds in _sound("train", 12)]
    rows[0] = "train0.wav\t25000"
    (source / "clip_durations.tsv").write_text("\n".join(["clip\tduration[ms]", *rows]) + "\n")
    monkeypatch.setattr(survey, "MOST_HEARD", 4)
    monkeypatch.setattr(survey, "_spread", lambda clips, count: clips[-count:])
    cfg = _config(tmp_path, source, data={"test_splits": []})
    examination, found = _examined(cfg)
    assert examination.facts["splits"]["train"]["decoded"] == 2
    assert examination.facts["splits"]["train"]["left_out"] == {"too_long": 1}
    assert found["too_long"].cost == 1 / 12
    assert examination.facts["batches"]["train_clips"] == 11


# Losses and operations, against what computes them


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    frames = np.array([20, 9, 30, 5, 12])
    labels = [rng.integers(1, 6, n) for n in (4, 3, 10, 1)] + [np.array([2, 2, 2, 3, 3, 1])]
    tokens = np.array([len(found) for found in labels])
    repeats = np.array([(found[1:] == found[:-1]).sum() for found in labels])
    padded = np.zeros((5, 10), np.int32)
    for row, found in enumerate(labels):
        padded[row, : len(found)] = found
    return frames, tokens, repeats, padded


def _ctc(logits, frames, labels, tokens):
    return np.asarray(
        ctc.ctc_loss(
            jnp.asarray(logits, jnp.float32),
            jnp.asarray(frames, jnp.int32),
            jnp.asarray(labels),
            jnp.asarray(tokens, jnp.int32),
        )
    )


def test_the_first_loss_is_that_of_equal_logits(clips):
    frames, tokens, repeats, labels = clips
    expected = _ctc(np.zeros((5, 30, 6)), frames, labels, tokens)
    found = forecast.uniform_loss(*(a.astype(float) for a in (frames, tokens, repeats)), 6)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_plateau_is_the_loss_of_a_model_that_does_not_listen():
    vocab, frames, tokens = 40, 120, 9
    rng = np.random.default_rng(1)
    share = np.r_[0, rng.dirichlet(np.ones(vocab - 1))]
    labels = rng.choice(vocab, tokens, p=share)[None].astype(np.int32)
    repeats = np.array([(labels[0, 1:] == labels[0, :-1]).sum()])
    spoken = tokens / frames
    probabilities = share * spoken + (np.arange(vocab) == 0) * (1 - spoken)
    logits = np.tile(np.log(np.maximum(probabilities, 1e-30)), (1, frames, 1))
    (expected,) = _ctc(logits, np.array([frames]), labels, np.array([tokens]))
    found = -np.log(share[labels]).sum() + forecast.timing_loss(
        np.array([float(frames)]), np.array([float(tokens)]), repeats.astype(float)
    )
    np.testing.assert_allclose(found, expected, rtol=0.01)


def test_training_less_computes_less():
    model_config = Wav2Vec2Config(hidden_size=1024, num_hidden_layers=24, intermediate_size=4096)
    work = forecast.Work(model_config, config.ModelConfig(), 1e9, 1e7, 100)
    shares = [work.relative_cost(layers, 64_000) for layers in (0, 2, 12, 24)]
    assert sorted(shares) == shares
    assert 0.3 < shares[0] < shares[1] < 0.5 < shares[3] < 1
    assert work.least_seconds(64_000, 1e12) == pytest.approx(10 * work.least_seconds(64_000, 1e13))


# Time


def test_times_of_shallow_models_extend_in_proportion():
    shallow = trial.Timed(1.0, 0.1, 10.0, 100, 1)
    deeper = trial.Timed(2.0, 0.3, 14.0, 300, 3)
    whole = trial._extended(None, 24, shallow, deeper)
    assert whole[:4] == pytest.approx((12.5, 2.4, 56.0, 2400))
    # 21 frozen layers at 0.5 and two more trained at three times that
    assert trial._extended(3, 24, shallow, deeper).accumulate_seconds == pytest.approx(14.5)


def test_days_follow_from_the_timed_update(tmp_path, no_trial):
    source = _release(tmp_path, train=_sound("train", 16), dev=_sound("dev", 4))
    cfg = _config(tmp_path, source, data={"num_buckets": 1, "test_splits": []})
    examination, _ = _examined(cfg)
    facts = examination.facts
    (asked,) = no_trial["asked"]
    assert (asked.samples, asked.tokens) == (facts["shapes"][0]["samples"], 24)
    # 2 devices take 2 clips each at once; 400 updates; scoring comes on top
    training = facts["batches"]["updates"] * (0.5 + 0.1)
    assert facts["batches"]["updates"] == 400
    assert training < facts["time"]["seconds"] < 1.7 * training
    assert facts["time"]["measured"]


def test_what_takes_too_long_to_time_is_said_and_bounded_from_below(tmp_path, no_trial):
    source = _release(tmp_path, train=_sound("train", 16), dev=_sound("dev", 4))
    no_trial["timed"] = pool.Failure("timeout", "more than 25 s")
    no_trial["devices"] = MACHINE._replace(flops_per_second=1e3)
    examination, found = _examined(_config(tmp_path, source, data={"test_splits": []}))
    assert not examination.facts["time"]["measured"]
    assert "at least" in found["duration"].message
    assert not found["duration"].fatal
    assert "nothing was measured" in " ".join(
        consultation.report(examination.facts, examination.findings).split()
    )


# Order, and what stops a run


def test_what_stops_the_run_comes_first_and_then_the_costliest():
    costs = [("a", 0.1, False), ("b", 0.9, False), ("c", 0.0, True), ("d", 0.5, False)]
    unordered = [findings.Finding(name, cost, name, fatal) for name, cost, fatal in costs]
    assert [found.name for found in findings.ordered(unordered)] == ["c", "b", "d", "a"]


@pytest.mark.parametrize(
    ("sections", "name", "said"),
    [
        ({"data": {"source": "/nowhere"}}, "data", "nothing is there"),
        ({"data": {"test_splits": ["tset"]}}, "data", "no split 'tset'"),
        ({"model": {"pretrained": "/nowhere"}}, "model", "/nowhere"),
        ({"model": {"config": TINY | {"num_attention_heads": 3}}}, "model", "does not divide"),
        ({"train": {"global_batch_size": 3}}, "batches", "train.global_batch_size 3"),
        ({"text": {"normalization": ["lowr"]}}, "data", "lowr"),
    ],
)
def test_what_cannot_work_stops_and_the_rest_is_still_said(
    sections, name, said, tmp_path, no_trial
):
    source = _release(tmp_path, **{s: _sound(s, 6) for s in ("train", "dev", "test")})
    examination, found = _examined(_config(tmp_path, source, **sections))
    assert found[name].fatal
    assert said in found[name].message
    assert examination.findings[0].fatal
    assert examination.facts["machine"]["devices"]["count"] == 2


def test_a_disk_that_is_too_small_stops(tmp_path, no_trial, monkeypatch):
    source = _release(tmp_path, **{s: _sound(s, 6) for s in ("train", "dev", "test")})
    monkeypatch.setattr(
        host, "free_disk", lambda place: {"path": place, "device": 1, "free_bytes": 1000}
    )
    _, found = _examined(_config(tmp_path, source))
    assert found["room"].fatal


@pytest.mark.parametrize("option", ["output_dir", "data.prepared_dir"])
def test_a_place_that_takes_no_files_stops(option, tmp_path, no_trial):
    source = _release(tmp_path, **{s: _sound(s, 6) for s in ("train", "dev", "test")})
    (tmp_path / "file").write_text("in the way")
    cfg = _config(tmp_path, source)
    _, found = _examined(config.build(config.as_dict(cfg), [f"--{option}={tmp_path}/file/below"]))
    assert found["unwritable"].fatal
    assert f"{tmp_path}/file cannot be written: give another --{option}." in (
        found["unwritable"].message
    )


@pytest.mark.parametrize(
    ("devices", "timed", "name"),
    [
        (pool.Failure("failed", "RuntimeError: no TPU"), None, "devices"),
        (MACHINE, pool.Failure("failed", "RESOURCE_EXHAUSTED: out of memory"), "trial"),
    ],
)
def test_devices_that_do_not_work_stop(devices, timed, name, tmp_path, no_trial):
    source = _release(tmp_path, **{s: _sound(s, 6) for s in ("train", "dev", "test")})
    no_trial["devices"], no_trial["timed"] = devices, timed
    _, found = _examined(_config(tmp_path, source))
    assert found[name].fatal


def test_precisions_are_judged_by_the_platform():
    assert not list(findings.precision("bf16", "tpu"))
    assert not list(findings.precision("fp32", "cpu"))
    assert list(findings.precision("fp16", "tpu"))
    assert list(findings.precision("bf16", "cpu"))


def test_the_product_that_times_a_machine_is_as_exact_as_the_models():
    def text(dtype):
        matrix = jax.ShapeDtypeStruct((8, 8), dtype)
        return jax.jit(trial._product).trace(matrix).lower(lowering_platforms=("cuda",)).as_text()

    assert "precision = [HIGHEST, HIGHEST]" in text(jnp.float32)
    assert "HIGHEST" not in text(jnp.bfloat16)


def test_what_is_asked_of_the_model_and_does_not_happen_is_said():
    model_config = Wav2Vec2Config(vocab_size=8, mask_time_prob=0.1)  # spans of 10
    cfg = config.build({"model": {"config": {"vocab_size": 99, "pad_token_id": 0}}})
    masks, size = findings.without_effect(cfg, model_config, most_frames=9)
    assert masks.message.startswith("no clip is masked: a span has 10 frames (mask_time_length)")
    assert size.message.startswith(
        "model.config.vocab_size 99 has no effect: the vocabulary makes it 8"
    )
    assert not list(findings.without_effect(config.Config(), model_config, most_frames=10))
    for unmasked in ({"mask_time_prob": 0.0}, {"apply_spec_augment": False}):
        model_config = Wav2Vec2Config(**unmasked)
        assert not list(findings.without_effect(config.Config(), model_config, most_frames=9))


def test_a_group_norm_encoder_is_warned_of_its_padding():
    (found,) = findings.batches(config.Config(), 0.07, group_norm=True)
    assert found.name == "group_norm"
    assert found.cost == 0.07
    assert not list(findings.batches(config.Config(), 0.07, group_norm=False))


@pytest.mark.parametrize(
    ("length", "way_out", "has_no_effect"),
    [
        ({}, "Raise train.num_train_epochs or", False),
        ({"num_train_epochs": 9.0}, "Raise train.num_train_epochs or", False),
        ({"max_steps": 9}, "Raise train.max_steps or", False),
        ({"max_steps": 9, "num_train_epochs": 5.0}, "Raise train.max_steps or", True),
    ],
)
def test_steps_take_the_place_of_epochs_and_that_is_said(length, way_out, has_no_effect):
    cfg = config.build({"train": {"eval_steps": 3, **length}, "optim": {"warmup_steps": 1}})
    few, *others = findings.schedule(cfg, updates=9, fresh_head=True)
    assert way_out in few.message
    said = "train.num_train_epochs 5 has no effect, as train.max_steps 9"
    assert [other.message.startswith(said) for other in others] == [True] * has_no_effect


def test_a_bar_is_as_long_as_its_count_and_many_bins_fit_a_screen():
    assert list(consultation.bars(["a", "bb"], [1, 2])) == [f" a {'█' * 20} 1", f"bb {'█' * 40} 2"]
    lines = list(consultation.bars([str(n) for n in range(100)], [1] * 100))
    assert len(lines) <= 25
    assert sum(int(line.split()[-1]) for line in lines) == 100


# The command, with its real processes


@pytest.mark.slow
def test_the_command_times_a_real_update_and_speaks_to_programs(tmp_path, capsys, monkeypatch):
    for limit in ("TRIAL_SECONDS", "HEAR_SECONDS"):  # other tests may be at work beside it
        monkeypatch.setattr(doctor, limit, 200.0)
    cfg = _config(
        tmp_path, CORPUS, data={"source": str(CORPUS), "language": "yue", "max_train_clips": 60}
    )
    config.save(cfg, tmp_path / "config.yaml")
    assert __main__.main(["doctor", "--config", str(tmp_path / "config.yaml"), "--json", "-"]) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    said = json.loads(line)
    assert said["can_work"]
    assert said["machine"]["devices"]["count"] == 2
    assert said["time"]["measured"]
    assert said["time"]["whole_model"]
    assert 0 < said["time"]["trial"]["accumulate_seconds"] < 10
    assert math.isfinite(said["time"]["days"])
    assert said["splits"]["train"] == {
        "clips": 510,
        "complete": True,
        "decoded": 510,
        "lengths_from": "clip_durations.tsv",
        "speakers": 51,
        "left_out": {},
    }
    assert "Losses to expect" in captured.err
    assert "Traceback" not in captured.err


def test_a_run_that_cannot_work_is_reported_whole_and_is_status_2(tmp_path, capsys, no_trial):
    cfg = _config(tmp_path, tmp_path / "nowhere")
    config.save(cfg, tmp_path / "config.yaml")
    target = tmp_path / "found.json"
    words = ["doctor", "--config", str(tmp_path / "config.yaml"), "--json", str(target)]
    assert __main__.main(words) == 2
    captured = capsys.readouterr()
    assert "Machine" in captured.out
    assert "STOP" in captured.out
    assert captured.err.splitlines()[-1].startswith("flax-asr: this run cannot work")
    assert not json.loads(target.read_text(encoding="utf-8"))["can_work"]
