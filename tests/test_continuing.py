"""Fine-tuning what was fine-tuned: which head, which history, and what the card tells of both."""

import json
import logging
import shutil

import flax.traverse_util
import numpy as np
import pytest
import small_saved
from huggingface_hub import ModelCard

from flax_asr import card, config, corpora, errors, initial_weights, inventory, origins
from flax_asr.models import hub, weights
from flax_asr.record import lineage

LETTERS = "".join(small_saved.VOCABULARY.characters)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export whose head writes a to h and spaces."""
    saved = small_saved.saved()
    folder = tmp_path_factory.mktemp("runs") / "first"
    small_saved.export_folder(folder, saved)
    return folder


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    sentences = {"same": ["abcd efgh", "ha"], "other": ["abcd xyz", "ha"], "fewer": ["abc", "ab"]}
    return {
        name: small_saved.split(folder / name, said, seconds=(1.0, 2.0))
        for name, said in sentences.items()
    }


def _started(splits, exported, said: str, *more: str) -> tuple[origins.Origin, dict, dict]:
    """The run's beginning on a split; parameters of it and of the export, flat."""
    options = [
        f"--model.pretrained={exported}",
        "--data.language=eu",
        "--data.train_splits=train",
        "--data.eval_splits=[]",
        "--data.test_splits=[]",
        *more,
    ]
    cfg = config.build({}, options)
    start = origins.read(cfg.model)
    corpus = corpora.gather(cfg, start, {"train": splits[said]})
    start, params = initial_weights.load(cfg, start, corpus)
    old = flax.traverse_util.flatten_dict(small_saved.saved().params, sep="/")
    return start, flax.traverse_util.flatten_dict(params, sep="/"), old


def _card(facts: dict) -> str:
    run = config.build({"data": {"language": "eu"}, "train": {"global_batch_size": 8}})
    return card.render("third", small_saved.saved(facts=facts, run=run), [], has_curves=False)


def _same(ours: dict, theirs: dict, part: str) -> bool:
    names = [name for name in theirs if name.startswith(part)]
    assert names
    return all(
        ours[name].shape == theirs[name].shape and np.array_equal(ours[name], theirs[name])
        for name in names
    )


@pytest.mark.parametrize(
    ("said", "more", "head"),
    [
        ("same", (), "kept"),
        ("same", ("--model.reset_head=true",), "fresh, 11 symbols"),
        ("other", (), "fresh, 11 symbols"),
        ("fewer", (), "fresh, 5 symbols"),
    ],
)
def test_the_head_is_kept_where_the_vocabulary_is_the_same(splits, exported, said, more, head):
    start, ours, theirs = _started(splits, exported, said, *more)
    assert start.facts["head"] == head
    assert _same(ours, theirs, "wav2vec2/")
    assert _same(ours, theirs, "lm_head/") == (head == "kept")


def test_the_head_s_own_vocabulary_keeps_it_whatever_the_transcripts_say(splits, exported):
    named = f"--text.vocabulary={exported}"
    start, ours, theirs = _started(splits, exported, "fewer", named)
    assert start.facts["head"] == "kept"
    assert _same(ours, theirs, "lm_head/")


def test_a_vocabulary_that_does_not_fit_the_head_is_said(splits, exported, tmp_path, caplog):
    tokens = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "|", *"abcdefz"])}
    (tmp_path / "vocab.json").write_text(json.dumps(tokens))
    named = f"--text.vocabulary={tmp_path / 'vocab.json'}"
    with caplog.at_level(logging.INFO):
        start, _, _ = _started(splits, exported, "same", named)
    assert start.facts["head"] == "fresh, 10 symbols"
    said = caplog.text
    assert "its head writes 11 symbols" in said
    assert "the run needs 10: it lacks 1 of them ('z')" in said
    assert "text.vocabulary" in said
    # Of what the transcripts say, these have no symbol: g h.
    assert "has no symbol for 2 characters" in said


@pytest.mark.parametrize(
    "changes", [{"tokenizer_class": "Wav2Vec2PhonemeCTCTokenizer"}, {"pad_token": None}]
)
def test_a_head_of_a_strange_vocabulary_gives_way_where_a_fresh_one_is_asked_for(
    splits, exported, tmp_path, changes
):
    """As facebook/wav2vec2-xlsr-53-espeak-cv-ft has, which writes phonemes."""
    folder = shutil.copytree(exported, tmp_path / "strange")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(errors.ModelError, match=r"fresh head.*model\.reset_head true"):
        _started(splits, folder, "same")
    start, ours, theirs = _started(splits, folder, "same", "--model.reset_head=true")
    assert start.facts["head"] == "fresh, 11 symbols"
    assert _same(ours, theirs, "wav2vec2/")
    assert not _same(ours, theirs, "lm_head/")


def test_a_model_of_another_sampling_rate_is_not_trained(splits, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "telephone")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sampling_rate": 8000}))
    with pytest.raises(errors.ModelError, match="takes audio at 8000 Hz; only 16000 Hz"):
        _started(splits, folder, "same")


def test_an_encoder_with_a_vocabulary_and_no_head_is_not_said_to_have_one(
    splits, exported, tmp_path, caplog
):
    # as facebook/wav2vec2-base lies on the hub
    folder = shutil.copytree(exported, tmp_path / "encoder")
    encoder = {
        name: np.array(tensor)
        for name, tensor in weights.read(folder).items()
        if not name.startswith("lm_head.")
    }
    weights.write(folder, encoder)
    for said, more in (("other", ()), ("same", (f"--text.vocabulary={folder}",))):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            start, _, _ = _started(splits, folder, said, *more)
        assert start.facts["head"] == "fresh, 11 symbols"
        assert "the model has no head" in caplog.text
        assert "its head writes" not in caplog.text


def test_a_run_without_an_export_and_a_checkpoint_are_told_how_to_become_a_model(tmp_path):
    run = tmp_path / "run"
    checkpoint = run / inventory.FOLDER / "30"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").touch()
    for named, said in {
        run: f"{run} is a run that has not finished: .*`flax-asr export {run} FOLDER`",
        checkpoint: f"{checkpoint} is a checkpoint: .*`flax-asr export {run} FOLDER --step 30`",
    }.items():
        with pytest.raises(errors.ModelError, match=said):
            origins.read(config.ModelConfig(pretrained=str(named)))


def test_a_run_s_vocabulary_is_that_of_its_export(splits, exported, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "4").mkdir(parents=True)
    shutil.copytree(exported, run / "export")
    (run / "config.yaml").write_text("seed: 1\n")
    assert inventory.is_run(run)
    start, _, _ = _started(splits, run, "fewer", f"--text.vocabulary={run}")
    assert start.facts["head"] == "kept"


def test_the_vocabulary_of_a_hub_model_is_taken_without_its_weights(monkeypatch, exported):
    asked = []

    def resolve(name, with_weights=True):
        asked.append((name, with_weights))
        return exported, "0123abc"

    monkeypatch.setattr(hub, "resolve", resolve)
    assert origins.symbols("someone/model") == small_saved.VOCABULARY
    assert asked == [("someone/model", False)]


def test_a_vocabulary_of_another_language_is_refused(splits, exported, tmp_path):
    tokens = {"[PAD]": 0, "[UNK]": 1, "|": 2, "a": 3, "z": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(tokens))
    with pytest.raises(errors.ConfigError, match=r"no symbol for 7 .*another language"):
        _started(splits, exported, "same", f"--text.vocabulary={tmp_path / 'vocab.json'}")


def test_a_vocabulary_file_that_is_none_is_refused(splits, exported, tmp_path):
    for content in ("[1]", "{", json.dumps({"a": 0, "b": 7})):
        (tmp_path / "vocab.json").write_text(content)
        with pytest.raises(errors.ModelError, match=r"vocab\.json"):
            _started(splits, exported, "same", f"--text.vocabulary={tmp_path / 'vocab.json'}")
    with pytest.raises(errors.ModelError, match="no such file"):
        _started(splits, exported, "same", f"--text.vocabulary={tmp_path / 'absent.json'}")


def test_the_history_is_that_of_the_export_and_its_own(splits, exported):
    start, _, _ = _started(splits, exported, "same")
    assert start.facts["lineage"] == [
        {
            "started_from": "facebook/wav2vec2-xls-r-300m",
            "revision": "c0ffee",
            "head": "fresh, 11 symbols",
            "release": "cv-corpus-9",
            "language": "eu",
            "updates": 30,
        }
    ]


def test_a_chain_of_three_runs_is_told_by_the_card(splits, exported, tmp_path):
    start, _, _ = _started(splits, exported, "same")
    second = small_saved.saved(facts=start.facts)
    small_saved.export_folder(tmp_path / "second", second)
    start, _, _ = _started(splits, tmp_path / "second", "other")
    assert [run["started_from"] for run in start.facts["lineage"]] == [
        "facebook/wav2vec2-xls-r-300m",
        str(exported),
    ]
    text = _card(start.facts)
    for line in (
        "- Before, 1: from facebook/wav2vec2-xls-r-300m at c0ffee, 30 updates on cv-corpus-9 eu;"
        " head: fresh, 11 symbols",
        "- Before, 2: from first, 30 updates on cv-corpus-9 eu; head: kept",
        "- Started from: second; head: fresh, 11 symbols",
        "local model second, which goes back to [facebook/wav2vec2-xls-r-300m]",
    ):
        assert line in text
    assert str(tmp_path) not in text
    assert ModelCard(text).data.base_model == "facebook/wav2vec2-xls-r-300m"
    assert ModelCard(text).data.license == "apache-2.0"


def test_a_run_that_was_made_longer_says_so():
    extensions = [{"after": 20, "planned": 20}]
    text = _card({"extensions": extensions})
    assert "after 30 updates; made longer after update 20, when 20 were planned" in text


def test_other_people_s_models_have_no_history(tmp_path):
    assert lineage.behind(tmp_path) == []
    foreign = {"language": "eu", "normalization": []}
    (tmp_path / lineage.FILE).write_text(json.dumps(foreign))
    assert lineage.behind(tmp_path) == []


@pytest.mark.parametrize(
    "damage",
    [
        {"lineage": "x"},
        {"lineage": [{"started_from": 3}]},
        {"splits": {}},
        {"head": 7},
        {"started_from": ["a"]},
    ],
)
def test_a_damaged_history_is_named(exported, tmp_path, damage):
    facts = json.loads((exported / lineage.FILE).read_text()) | damage
    (tmp_path / lineage.FILE).write_text(json.dumps(facts))
    with pytest.raises(errors.ModelError, match=r"flax_asr\.json is damaged"):
        lineage.behind(tmp_path)


def test_a_hostile_history_stays_text():
    nasty = "x](http://evil) <script>"
    run = {
        "started_from": nasty,
        "revision": nasty,
        "head": nasty,
        "release": nasty,
        "language": nasty,
        "updates": 1,
    }
    facts = {"started_from": "/home/x", "revision": None, "lineage": [run]}
    text = _card(facts)
    assert "](http://evil)" not in text
    assert "<script>" not in text
    assert ModelCard(text).data.base_model is None
