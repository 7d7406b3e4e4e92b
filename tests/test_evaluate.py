"""Scores: equal to jiwer over all clips, over real frames only, whatever the batches."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
from unittest import mock

import jax
import jiwer
import numpy as np
import pytest
import small_saved
import soundfile

from flax_asr import (
    checkpoint,
    comparison,
    config,
    errors,
    evaluate,
    loading,
    parallel,
    score_files,
    scored_splits,
    scoring,
    static_shapes,
    text,
    vocabulary,
)
from flax_asr.data import buckets, examples, prepare
from flax_asr.models import wav2vec2
from flax_asr.record import lineage

pytestmark = pytest.mark.usefixtures("quick_compilation")

WRITES = small_saved.VOCABULARY
SENTENCES = ["a b", "abc de", "h", "gg a", "fed cab", "b", "ab ab", "ce", "d e f", "hag", "bad"]


def _examples(folder, model_config, sentences=SENTENCES) -> examples.Examples:
    return examples.build(
        [small_saved.split(folder, sentences)],
        normalize=str.lower,
        vocabulary=WRITES,
        frame_lengths=functools.partial(wav2vec2.frame_lengths, model_config),
    )


@pytest.fixture(scope="module")
def saved():
    return small_saved.saved()


@pytest.fixture(scope="module")
def data(tmp_path_factory, saved):
    return _examples(tmp_path_factory.mktemp("split"), saved.model_config)


@pytest.fixture(scope="module")
def shapes(saved, data):
    return static_shapes.training(config.Config(), saved.model_config, data)


def _invented(data, shapes, model_config, infeasible=()):
    """A forward that says something wrong about every clip, and nonsense in the padding."""
    by_length = {int(n): row for row, n in enumerate(data.samples)}
    assert len(by_length) == len(data), "clips must differ in length to be told apart"

    def forward(batch):
        frames = int(wav2vec2.frame_lengths(model_config, batch.audio.shape[1]))
        lengths = wav2vec2.frame_lengths(model_config, batch.sample_lengths)
        ids = np.full((len(lengths), frames), 7, np.int32)
        losses = np.full(len(lengths), 1e9, np.float32)
        for place, samples in enumerate(batch.sample_lengths):
            if samples:
                row = by_length[int(samples)]
                ids[place, : lengths[place]] = _path(data, row, int(lengths[place]))
                losses[place] = np.inf if row in infeasible else row
        return losses, ids, lengths

    return forward


def _path(data, row, frames):
    """The labels, one of them wrong in every second clip, then blanks."""
    path = np.zeros(frames, np.int32)
    labels = data.labels(row).copy()
    if row % 2:
        labels[0] = 3 + (labels[0] - 2) % 8
    path[: 2 * len(labels) : 2] = labels
    return path


def _score(
    forward, data, shapes, rows=4, plan=buckets.EvalPlan, language="eu", rewrite=None, **options
):
    plan = plan(data.samples, shapes.samples, rows)
    compared = comparison.Comparison(WRITES, language, ["lower"], rewrite)
    return evaluate.score(forward, data, plan, compared, seed=1, **options)


def _hypotheses(data):
    said = []
    for row in range(len(data)):
        labels = data.labels(row).copy()
        if row % 2:
            labels[0] = 3 + (labels[0] - 2) % 8
        said.append("".join(WRITES.tokens[i] for i in labels).replace("|", " "))
    return said


def test_rates_are_jiwers_over_all_clips(data, shapes, saved):
    scores = _score(_invented(data, shapes, saved.model_config), data, shapes)
    hypotheses = _hypotheses(data)
    assert scores.cer.value == pytest.approx(jiwer.cer(data.references, hypotheses), abs=1e-12)
    assert scores.wer.value == pytest.approx(jiwer.wer(data.references, hypotheses), abs=1e-12)
    assert 0 < scores.cer.low < scores.cer.value < scores.cer.high
    assert scores.clips == len(data)
    metrics = scores.as_metrics("eval")
    assert metrics["eval_cer"] == scores.cer.value
    assert metrics["eval_loss"] == scores.loss


def test_every_score_names_release_hash_clips_and_rule(data, shapes, saved):
    forward = _invented(data, shapes, saved.model_config)
    scores = _score(forward, data, shapes, language="zh-HK")
    logged = scores.as_metrics("eval")
    assert (logged["eval_release"], logged["eval_hash"]) == (data.release, data.hash)
    assert logged["eval_clips"] == len(data)
    assert logged["eval_rule"] == (
        "greedy, real frames only; CER over code points, spaces not counted; an unknown character"
        " is one error; normalisation: lower"
    )
    for said in (data.release, data.hash[:16], f"{len(data)} clips", logged["eval_rule"]):
        assert said in scores.describe("eval")
    padded = _score(forward, data, shapes, plan=buckets.InOrder, padded=True)
    assert "padded frames too" in padded.rule


def test_the_loss_is_the_mean_over_clips_and_fillers_count_nothing(data, shapes, saved):
    forward = _invented(data, shapes, saved.model_config)
    expected = np.mean(range(len(data)))
    for rows in (1, 4, 8, 32):
        assert _score(forward, data, shapes, rows).loss == pytest.approx(expected, abs=1e-9)


def test_every_figure_is_the_same_whatever_the_batches(data, shapes, saved):
    forward = _invented(data, shapes, saved.model_config)
    assert len({_score(forward, data, shapes, rows) for rows in (1, 3, 16)}) == 1


def test_infeasible_clips_are_counted_apart_and_said(data, shapes, saved):
    forward = _invented(data, shapes, saved.model_config, infeasible={3, 5})
    scores = _score(forward, data, shapes)
    expected = np.mean([row for row in range(len(data)) if row not in {3, 5}])
    assert scores.infeasible == 2
    assert scores.loss == pytest.approx(expected, abs=1e-9)
    assert scores.clips == len(data)
    assert "2 clips without an alignment" in scores.describe("eval")


def test_a_loss_that_is_not_a_number_is_not_hidden(data, shapes, saved):
    true = _invented(data, shapes, saved.model_config)

    def forward(batch):
        losses, ids, lengths = true(batch)
        return losses * np.nan, ids, lengths

    scores = _score(forward, data, shapes)
    assert np.isnan(scores.loss)
    assert f"for {len(data)} clips the model's scores are NaN" in scores.describe("eval")


def test_padded_frames_count_only_when_scoring_as_the_old_scripts_did(data, shapes, saved):
    forward = _invented(data, shapes, saved.model_config)
    honest = _score(forward, data, shapes)
    old = _score(forward, data, shapes, plan=buckets.InOrder, padded=True)
    # The padding says "e", once, in every clip that is not the longest of its batch.
    padded_clips = 0
    for start in range(0, len(data), 4):
        lengths = wav2vec2.frame_lengths(saved.model_config, data.samples[start : start + 4])
        padded_clips += int((lengths < lengths.max()).sum())
    assert padded_clips > 3
    assert old.padded.cer.counts.errors == honest.cer.counts.errors + padded_clips
    assert old.padded.cer.counts.units == honest.cer.counts.units
    assert (old.cer, old.wer) == (honest.cer, honest.wer)
    assert old.loss == pytest.approx(honest.loss)
    logged = old.as_metrics("eval")
    assert logged["eval_cer"] == old.padded.cer.value
    assert (logged["eval_real_cer"], logged["eval_real_wer"]) == (old.cer.value, old.wer.value)
    assert "eval_real_cer" not in honest.as_metrics("eval")


def test_in_order_is_the_order_of_the_corpus_and_every_row_once(data, shapes):
    groups = list(buckets.InOrder(data.samples, shapes.samples, 4))
    rows = np.concatenate([group.rows for group in groups])
    assert rows[rows >= 0].tolist() == list(range(len(data)))
    for group in groups:
        longest = data.samples[group.rows[group.rows >= 0]].max()
        assert shapes.samples[group.shape] >= longest


def test_the_blank_fraction_is_over_real_frames(data, shapes, saved):
    forward = _invented(data, shapes, saved.model_config)
    frames = wav2vec2.frame_lengths(saved.model_config, data.samples)
    expected = 1 - data.label_lengths.sum() / frames.sum()
    assert _score(forward, data, shapes).blank_fraction == pytest.approx(expected)


def test_spaces_count_only_where_words_are_separated(data, shapes, saved):
    forward = _invented(data, shapes, saved.model_config)
    spaced = _score(forward, data, shapes).cer.counts.units
    unspaced = _score(forward, data, shapes, language="zh-HK")
    assert spaced - unspaced.cer.counts.units == sum(r.count(" ") for r in data.references)
    assert "no spaces" in unspaced.describe("test")


def test_an_unknown_symbol_is_one_error_and_is_written_out(saved, shapes, tmp_path_factory):
    """The reference's own unknown character is not excused by it."""
    data = _examples(tmp_path_factory.mktemp("unknown"), saved.model_config, ["aЖb"])
    frames = int(wav2vec2.frame_lengths(saved.model_config, data.samples[0]))

    def forward(batch):
        ids = np.zeros((len(batch.weights), max(frames, 99)), np.int32)
        ids[:, [0, 2, 4]] = WRITES.encode("aЖb")
        return np.ones(len(ids)), ids, np.full(len(ids), frames)

    predictions = []
    scores = _score(forward, data, shapes, predictions=predictions, padded=True)
    assert (scores.cer.counts.errors, scores.cer.counts.units) == (1, 3)
    assert [line["hypothesis"] for line in predictions] == ["a[UNK]b"]
    # The old scripts wrote it out on both sides, where it was right.
    assert (scores.padded.cer.counts.errors, scores.padded.cer.counts.units) == (0, 7)


def _saying(*symbols: int):
    """A forward pass in which every clip says these symbols."""

    def forward(batch):
        ids = np.zeros((len(batch.weights), 99), np.int32)
        ids[:, : len(symbols)] = symbols
        return np.ones(len(ids)), ids, np.full(len(ids), 9)

    return forward


def test_a_model_that_has_capitals_only_is_compared_without_case(saved, shapes, tmp_path):
    split = small_saved.split(tmp_path, ["ab"])
    capitals = vocabulary.Vocabulary(("<pad>", "A", "B"), blank=0)
    data = examples.build(
        [split],
        normalize=str.lower,
        vocabulary=capitals,
        frame_lengths=functools.partial(wav2vec2.frame_lengths, saved.model_config),
    )

    forward = _saying(1, 2)
    plan = buckets.EvalPlan(data.samples, shapes.samples, 4)
    compared = comparison.Comparison(capitals, "en", ["lower"])
    scores = evaluate.score(forward, data, plan, compared, seed=1)
    assert scores.cer.value == scores.wer.value == 0


def test_groups_of_speakers_add_up_and_unknown_facts_are_not_shown(data, shapes, saved):
    scores = _score(_invented(data, shapes, saved.model_config), data, shapes)
    assert {group.fact for group in scores.groups} == {"gender"}
    assert [(group.value, group.clips) for group in scores.groups] == [
        ("female", 4),
        ("male", 4),
        ("unknown", 3),
    ]
    female = [row for row in range(len(data)) if row % 3 == 0]
    expected = jiwer.cer(
        [data.references[row] for row in female], [_hypotheses(data)[row] for row in female]
    )
    found = next(group.cer for group in scores.groups if group.value == "female")
    assert found == pytest.approx(expected, abs=1e-12)
    assert "female" in scores.table()


def test_predictions_add_up_to_the_score_and_name_no_speaker(data, shapes, saved):
    lines = []
    forward = _invented(data, shapes, saved.model_config)
    scores = _score(forward, data, shapes, predictions=lines)
    assert {line["id"]: line["hypothesis"] for line in lines} == dict(
        zip(data.ids, _hypotheses(data), strict=True)
    )
    assert sum(line["errors"] for line in lines) == scores.cer.counts.errors
    assert sum(line["units"] for line in lines) == scores.cer.counts.units
    assert "secret" not in json.dumps(lines)


def test_what_a_model_of_other_rules_writes_is_normalised_before_it_is_compared(
    saved, shapes, tmp_path
):
    split = small_saved.split(tmp_path, ["ab"])
    theirs = vocabulary.Vocabulary(("<pad>", "a", "A", "b", ",", "[UNK]"), blank=0, unknown=5)
    data = examples.build(
        [split],
        normalize=str.lower,
        vocabulary=theirs,
        frame_lengths=functools.partial(wav2vec2.frame_lengths, saved.model_config),
    )

    forward = _saying(2, 3, 5, 4)  # "Ab[UNK],"
    plan = buckets.EvalPlan(data.samples, shapes.samples, 4)
    steps = ["lower", "strip_punctuation"]
    found = {}
    for rewrite in (None, text.normalizer(steps)):
        lines = []
        compared = comparison.Comparison(theirs, "en", steps, rewrite)
        scores = evaluate.score(forward, data, plan, compared, seed=1, predictions=lines)
        (line,) = lines
        found[rewrite is None] = scores.cer.counts.errors, line["hypothesis"], scores.rule
    # The capital and the comma are no errors, the unknown character is one.
    assert found[True][:2] == (3, "Ab[UNK],")
    assert found[False][:2] == (1, "ab[UNK]")
    assert "normalisation, also of what the model writes: lower" in found[False][2]
    assert "normalisation: lower" in found[True][2]


@pytest.mark.parametrize("known", [True, False])
def test_a_foreign_model_s_text_is_normalised_and_our_own_is_as_it_is(
    exported, release, known, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(exported, model)
    options = _scored_on(release)
    if not known:
        (model / "flax_asr.json").unlink()
        options += ["--data.language=eu", "--text.normalization=[lower, spaces]"]
    evaluate.command(str(model), options, "-")
    rule = json.loads(capsys.readouterr().out)["rule"]
    assert ("normalisation: lower, spaces" in rule) == known
    assert ("normalisation, also of what the model writes: lower, spaces" in rule) != known


def _loaded(saved, **settings) -> loading.LoadedModel:
    return loading.LoadedModel(
        config=saved.model_config,
        params=saved.params,
        vocabulary=saved.vocabulary,
        do_normalize=True,
        use_attention_mask=True,
        settings=settings,
        facts={},
        name="small",
    )


def test_only_a_model_that_hears_the_padding_is_said_to(saved, data):
    loaded = _loaded(saved)
    assert "padding" not in evaluate._caveats(loaded, data)
    loaded = dataclasses.replace(loaded, use_attention_mask=False)
    assert "changes with the padding" in evaluate._caveats(loaded, data)


def test_the_rule_says_which_spaces_count_and_whose_text_was_normalised():
    def parts(**how):
        _, spaces, _, steps = scoring.rule(["lower"], **how).split("; ")
        return spaces.removeprefix("CER over code points, spaces "), steps.partition(":")[0]

    assert parts(spaced=True) == ("counted", "normalisation")
    assert parts(spaced=False) == ("not counted", "normalisation")
    assert parts(spaced=False, padded=True) == ("counted", "normalisation")
    rewritten = "normalisation, also of what the model writes"
    assert parts(spaced=True, rewritten=True) == ("counted", rewritten)


def test_the_old_way_of_scoring_rewrites_nothing_and_does_not_say_so(data, shapes, saved):
    forward = _invented(data, shapes, saved.model_config)
    old = _score(forward, data, shapes, 4, buckets.InOrder, padded=True, rewrite=str.lower)
    assert "also of what the model writes" not in old.rule
    assert "also of what the model writes" in _score(forward, data, shapes, rewrite=str.lower).rule


@pytest.mark.slow
def test_batches_score_as_one_clip_at_a_time_and_the_old_way_does_not(data, shapes, saved):
    """A model of random weights, which says much in the padding."""
    loaded = _loaded(saved)
    devices = parallel.Devices()
    assert devices.count == 2
    cfg = config.build({"train": {"per_device_eval_batch_size": 3, "mixed_precision": "fp32"}})
    batched = evaluate.compiled(loaded, cfg, shapes, devices)
    scores = _score(batched, data, shapes, 6, tokens=shapes.tokens)

    single = parallel.Devices(jax.devices()[:1])
    exact = static_shapes.Shapes(tuple(sorted({int(n) for n in data.samples})), (16,) * len(data))
    cfg = config.build({"train": {"per_device_eval_batch_size": 1, "mixed_precision": "fp32"}})
    alone = evaluate.compiled(loaded, cfg, exact, single)
    one_by_one = _score(alone, data, exact, 1, tokens=exact.tokens)

    assert scores.cer == one_by_one.cer
    assert scores.wer == one_by_one.wer
    assert scores.loss == pytest.approx(one_by_one.loss, rel=1e-5)
    assert scores.cer.value > 0.5
    old = _score(batched, data, shapes, 6, buckets.InOrder, tokens=shapes.tokens, padded=True)
    assert old.padded.cer.counts.errors > scores.cer.counts.errors


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A Common Voice release with one split, one of whose recordings is not there."""
    folder = tmp_path_factory.mktemp("cv") / "cv-corpus-9" / "eu"
    (folder / "clips").mkdir(parents=True)
    rows = ["client_id\tpath\tsentence\tgender"]
    for number, sentence in enumerate(SENTENCES):
        samples = small_saved.speech(3000 + 100 * number, number)
        soundfile.write(folder / "clips" / f"{number}.wav", samples, 16_000)
        rows.append(f"speaker{number % 3}\t{number}.wav\t{sentence.upper()}\tfemale_feminine")
    rows.append("speaker0\tgone.wav\tA\t")
    (folder / "test.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def _scored_on(release, buckets=1) -> list[str]:
    """Options: its test split, which the first of these tests decodes for all."""
    prepared = release.parent / "prepared"
    return [
        f"--data.source={release}",
        f"--data.prepared_dir={prepared}",
        "--data.num_workers=1",
        f"--data.num_buckets={buckets}",
    ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, saved):
    folder = tmp_path_factory.mktemp("model") / "export"
    small_saved.export_folder(folder, saved)
    return folder


def test_the_command_scores_an_export_without_its_run(
    exported, release, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    evaluate.command(str(exported), _scored_on(release, buckets=2), "-", legacy=True)
    output = capsys.readouterr()
    (line,) = map(json.loads, output.out.splitlines())
    assert line["split"] == "test"
    assert line["clips"] == len(SENTENCES)
    for name in ("eval_loss", "eval_wer", "eval_cer", "legacy_cer", "legacy_wer"):
        assert np.isfinite(line[name]), name
    assert len(line["hash"]) == 64
    assert "cv-corpus-9" in line["release"]
    assert "normalisation: lower, spaces" in line["rule"]
    assert "test CER" in output.err
    lines = pathlib.Path(line["predictions"]).read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["reference"] for line in lines} == set(SENTENCES)


def test_the_command_scores_without_normalisation_where_there_is_to_be_none(
    exported, release, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    evaluate.command(str(exported), [*_scored_on(release), "--text.normalization=[]"], "-")
    line = json.loads(capsys.readouterr().out)
    assert "normalisation: none" in line["rule"]
    lines = pathlib.Path(line["predictions"]).read_text(encoding="utf-8").splitlines()
    found = {json.loads(line)["reference"] for line in lines}
    assert found == {sentence.upper() for sentence in SENTENCES}


def test_clips_that_are_not_scored_are_named_beside_the_predictions(
    exported, release, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    evaluate.command(
        str(exported), [*_scored_on(release), "--text.normalization=[lower, {remove: h}]"], "-"
    )
    output = capsys.readouterr()
    line = json.loads(output.out)
    assert (line["clips"], line["left_out"]) == (len(SENTENCES) - 1, "1 empty_transcript")
    file = line["predictions"].replace("predictions-", "left_out-")
    assert f"left out: 1 empty_transcript ({file} names each)" in output.err
    lacking = release.parent / "prepared" / "test" / "left_out.jsonl"
    assert f"not prepared: 1 missing ({lacking} names each)" in output.err
    assert (lacking.is_file(), line["not_prepared"]) == (True, "1 missing")
    (named,) = map(json.loads, pathlib.Path(file).read_text(encoding="utf-8").splitlines())
    assert (named["set"], named["id"], named["reason"]) == ("test", "2.wav", "empty_transcript")


@pytest.fixture
def run(saved, release, tmp_path, monkeypatch):
    """A run folder in the present one, with the predictions of its own score of the release."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "30").mkdir(parents=True)
    config.save(config.Config(output_dir="elsewhere"), folder / "config.yaml")
    (folder / "predictions-test.jsonl").write_text("of the best one")
    cfg = config.build({}, ["--data.language=eu", "--data.test_splits=test", *_scored_on(release)])
    cfg = dataclasses.replace(
        cfg, data=dataclasses.replace(cfg.data, train_splits=(), eval_splits=())
    )
    frames = functools.partial(wav2vec2.frame_lengths, saved.model_config)
    own = examples.build(
        [prepare.prepare(cfg)["test"]],
        normalize=str.lower,
        vocabulary=WRITES,
        frame_lengths=frames,
    )
    facts = saved.meta.facts
    splits = facts["splits"] | {"test": facts["splits"]["test"] | {"hash": own.hash}}
    meta = dataclasses.replace(saved.meta, facts=facts | {"splits": splits})
    its = dataclasses.replace(saved, meta=meta)
    monkeypatch.setattr(checkpoint, "load_model", lambda folder, step=None: its)
    monkeypatch.chdir(tmp_path)
    return folder


def _written(run, options, capsys) -> str:
    """Scores it; the name of the file of predictions, which is complete."""
    capsys.readouterr()
    evaluate.command(str(run), options, "-")
    output = capsys.readouterr()
    (line,) = map(json.loads, output.out.splitlines())
    path = pathlib.Path(line["predictions"])
    assert f"predictions: {path}\n" in output.err
    assert len(path.read_text(encoding="utf-8").splitlines()) == line["clips"]
    return path.name


def test_a_named_checkpoint_leaves_the_predictions_of_the_best_one_alone(run, release, capsys):
    options = _scored_on(release)
    named = _written(run / "checkpoints" / "30", options, capsys)
    assert named == "predictions-test-step-30.jsonl"
    assert (run / "predictions-test.jsonl").read_text() == "of the best one"
    assert _written(run, options, capsys) == "predictions-test.jsonl"
    assert (run / "predictions-test.jsonl").read_bytes() == (run / named).read_bytes()


def _predictions(saved, run, data, split="test", options=(), **changes) -> str:
    """The name of the predictions of a score of these clips by a model of this run."""
    settings = saved.meta.run | {"text": {"normalization": ["lower", "spaces"]}}
    facts = {"splits": {"eval": {"hash": "e" * 64}, "test": {"hash": "a" * 64}}}
    loaded = dataclasses.replace(_loaded(saved, **settings), run=run, facts=facts, **changes)
    cfg = loading.configure(loaded, options)
    normalize = text.normalizer(cfg.normalization)
    return score_files.predictions(loaded, cfg, normalize, split, data).name


def _clips(hash, release="cv-corpus-9"):
    return mock.Mock(spec=examples.Examples, hash=hash * 64, release=release)


def test_a_run_s_own_data_that_are_not_seen_from_here_are_said_to_be_the_run_s(run, saved):
    """Its data.source is the relative path `x`."""
    with pytest.raises(
        errors.DataError, match=r"'?x'?: nothing is there \(seen.* is what .*run was"
    ):
        evaluate.command(str(run), [], None)
    with pytest.raises(errors.DataError, match="nothing is there") as refusal:
        evaluate.command(str(run), ["--data.source=y"], None)
    assert "trained on" not in str(refusal.value)
    pathlib.Path("x").mkdir()
    with pytest.raises(errors.DataError, match="not a Common Voice release") as refusal:
        evaluate.command(str(run), [], None)
    assert "trained on" not in str(refusal.value)


def test_other_data_do_not_go_where_the_run_keeps_its_own(saved, release, tmp_path):
    _, own, *_ = options = _scored_on(release)
    place = own.partition("=")[2]
    settings = config.as_dict(config.build({"output_dir": "r"}, ["--data.language=eu", *options]))
    loaded = _loaded(saved, **settings)
    prepare.prepare(scored_splits.configure(loaded, []))

    def place_of(*more):
        return scored_splits.configure(loaded, more).data.prepared_dir

    assert place_of() == place_of("--data.test_splits=train") == place
    assert place_of("--data.source=absent") is None
    assert place_of("--data.max_seconds=9") is None
    for given in ("here", place):
        assert place_of("--data.source=absent", f"--data.prepared_dir={given}") == given
    shutil.copytree(release, tmp_path / "moved")
    assert place_of(f"--data.source={tmp_path}/moved") == place
    (tmp_path / "moved" / "test.tsv").write_text("path\tsentence\n0.wav\ta\n")
    assert place_of(f"--data.source={tmp_path}/moved") is None


def test_what_is_scored_otherwise_than_the_run_did_has_a_name_of_its_own(saved, tmp_path):
    name = functools.partial(_predictions, saved, tmp_path)
    own, other = _clips("a"), _clips("b", "cv-corpus-10 delta/x")
    assert name(own) == "predictions-test.jsonl"
    assert name(own, step=30) == "predictions-test-step-30.jsonl"
    assert name(other) == "predictions-test-cv-corpus-10-delta-x-bbbbbbbb.jsonl"
    assert name(other, step=30).startswith("predictions-test-step-30-cv-corpus-10")
    assert name(other, "validated").startswith("predictions-validated-cv-corpus-10")
    # The evaluation set by the name of its split; no other one may be called as the run's own are.
    assert name(_clips("e"), "dev") == "predictions-dev.jsonl"
    assert name(own, "eval") == "predictions-eval-cv-corpus-9-aaaaaaaa.jsonl"
    precision = "--train.mixed_precision="
    assert name(own, options=[precision + "fp32"]) == "predictions-test-fp32.jsonl"
    assert name(own, options=[precision + "bf16"]) == "predictions-test.jsonl"
    rules = [name(own, options=[f"--text.normalization={r}"]) for r in ("[]", "[lower]")]
    assert all(re.fullmatch(r"predictions-test-rule-\w{8}\.jsonl", found) for found in rules)
    assert len(set(rules)) == 2
    same = ["--text.normalization=[lower, spaces]"]
    assert name(own, options=same) == "predictions-test.jsonl"


def test_outside_of_a_run_the_name_tells_the_model_too(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = functools.partial(_predictions, saved, None, _clips("a", "录音"))
    found = name(name="w11wo/wav2vec2-xls-r")
    assert found == "predictions-test-w11wo-wav2vec2-xls-r-录音-aaaaaaaa.jsonl"
    assert name(name="../a/export/") == "predictions-test-a-export-录音-aaaaaaaa.jsonl"
    assert tmp_path.name in name(name=".")
    long = _predictions(saved, None, _clips("a", "録" * 200), name="録" * 200 + "/export")
    assert len(os.fsencode(long)) < 220
    assert "録-export-録" in long


def test_a_run_that_only_others_may_write_can_be_scored(run, release, capsys, monkeypatch):
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != run and may(path, mode))
    name = _written(run, _scored_on(release), capsys)
    assert re.fullmatch(r"predictions-test-.*-run-cv-corpus-9-\w{8}\.jsonl", name)
    assert (run / "predictions-test.jsonl").read_text() == "of the best one"
    assert (run.parent / name).is_file()


def test_a_model_is_scored_where_nothing_can_be_written(
    exported, release, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != pathlib.Path() and may(path, mode))
    evaluate.command(str(exported), _scored_on(release), None)
    assert "no predictions are kept" in capsys.readouterr().out
    assert not list(tmp_path.glob("predictions-*"))


def test_a_score_is_shown_though_its_predictions_cannot_be_written(
    exported, release, capsys, monkeypatch, tmp_path
):
    def refuse(path, objects):
        raise errors.CheckpointError(f"cannot write {path}: No space left on device.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.json_lines, "write", refuse)
    with pytest.raises(errors.CheckpointError, match="No space left"):
        evaluate.command(str(exported), _scored_on(release), None)
    assert "test CER" in capsys.readouterr().out


def test_a_score_of_which_a_part_is_no_number_is_refused(
    exported, release, saved, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)

    def overflowing(batch):
        lengths = wav2vec2.frame_lengths(saved.model_config, batch.sample_lengths)
        losses = np.where(batch.sample_lengths == 3000, np.nan, 1)
        return losses, np.zeros((len(lengths), max(lengths)), np.int32), lengths

    monkeypatch.setattr(evaluate, "compiled", lambda *_: overflowing)
    said = re.escape(
        f"{exported}, split test, 1 of {len(SENTENCES)} clips: the scores in fp16 are NaN: give"
        " --train.mixed_precision bf16 or fp32."
    )
    with pytest.raises(errors.ModelError, match=f"^{said}$"):
        evaluate.command(
            str(exported), [*_scored_on(release), "--train.mixed_precision=fp16"], None
        )
    assert "CER" not in capsys.readouterr().out
    assert not list(tmp_path.glob("predictions-*"))


def test_a_model_of_unknown_language_must_be_told_it(exported, release, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for path in exported.iterdir():
        if path.name != lineage.FILE:
            (foreign / path.name).write_bytes(path.read_bytes())
    with pytest.raises(errors.ConfigError, match=r"give --data\.language"):
        evaluate.command(str(foreign), [f"--data.source={release}"], None)


def test_a_model_without_data_must_be_given_some(exported):
    with pytest.raises(errors.ConfigError, match=r"give --data\.source"):
        evaluate.command(str(exported), [], None)


def test_a_split_that_is_not_there_is_named_with_those_that_are(exported, release):
    with pytest.raises(errors.DataError, match=r"no split '?dev.*test"):
        evaluate.command(
            str(exported), [f"--data.source={release}", "--data.test_splits=dev"], None
        )


def test_a_model_of_capitals_only_is_not_blamed_for_small_letters():
    capitals = vocabulary.Vocabulary(("[PAD]", "A", "B"), blank=0)
    compared = comparison.Comparison(capitals, "en", ["lower"])
    assert compared.texts("Ab", np.array([1, 0, 2, 2])) == ("ab", "ab", "AB")
