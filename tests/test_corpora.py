"""What a run is trained and scored on, before anything is trained."""

import pytest
import small_saved

from flax_asr import config, corpora, errors, initial_weights, origins


def _warnings(tmp_path, train, scored, *more):
    cfg = config.build({}, ["--data.language=eu", "--data.eval_splits=[]", *more])
    kept = {
        "train": small_saved.split(tmp_path / "train", train, seconds=(1.0, 2.0)),
        "test": small_saved.split(tmp_path / "test", scored, seconds=(1.0, 2.0)),
    }
    start = origins.read(cfg.model)
    return kept, list(corpora.gather(cfg, start, kept).warnings())


def test_scored_clips_that_are_trained_on_are_warned_of(tmp_path):
    kept, said = _warnings(tmp_path, ["abc", "cab"], ["abc", "bac"])
    assert set(kept["train"].ids) == set(kept["test"].ids)
    assert said == [
        "2 of the 2 test clips are trained on: their scores say nothing of speech that the model"
        " has not heard."
    ]


def test_characters_that_training_does_not_have_are_warned_of(tmp_path):
    _, said = _warnings(tmp_path, ["abc", "cab"], ["abx", "yxb"])
    assert "2 characters of the test clips have no symbol, as training does not" in said[-1]
    assert "in 3 places of 6" in said[-1]


def test_characters_that_only_the_vocabulary_lacks_are_not_said_to_lack_in_training(tmp_path):
    (tmp_path / "vocab.json").write_text('{"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "c": 4}')
    more = f"--text.vocabulary={tmp_path / 'vocab.json'}"
    _, said = _warnings(tmp_path, ["abcd", "cab"], ["abd", "dcb"], more)
    assert "1 characters of the test clips have no symbol; in 2 places of 6" in said[-1]


def test_a_run_goes_on_without_the_file_of_its_vocabulary(tmp_path, caplog):
    named = f"--text.vocabulary={tmp_path / 'vocab.json'}"
    words = ["--data.language=eu", "--data.eval_splits=[]", "--data.test_splits=[]", named]
    cfg = config.build({}, words)
    kept = {"train": small_saved.split(tmp_path / "train", ["abc"], seconds=(1.0, 2.0))}
    past = origins.resumed(small_saved.saved().meta)
    assert corpora.gather(cfg, past, kept).vocabulary == small_saved.VOCABULARY
    assert "the run goes on with the symbols of its checkpoint" in caplog.text
    with pytest.raises(errors.ModelError, match=r"vocab\.json: no such file"):
        corpora.gather(cfg, origins.read(cfg.model), kept)


def test_nothing_to_train_on_is_said_as_such():
    cfg = config.build({}, ["--data.language=eu", "--data.train_splits=[]"])
    with pytest.raises(errors.ConfigError, match=r"data\.train_splits names no split"):
        corpora.gather(cfg, origins.read(cfg.model), {})


def test_more_layers_than_there_are_cannot_be_trained(tmp_path):
    words = ["--data.language=eu", "--data.eval_splits=[]", "--data.test_splits=[]"]
    cfg = config.build({}, [*words, "--model.trainable_layers=13"])
    kept = {"train": small_saved.split(tmp_path / "train", ["abc"], seconds=(1.0, 2.0))}
    start = origins.read(cfg.model)
    corpus = corpora.gather(cfg, start, kept)
    with pytest.raises(errors.ConfigError, match="trainable_layers is 13: the encoder has 12"):
        initial_weights.load(cfg, start, corpus)
