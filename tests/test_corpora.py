"""What a run is trained and scored on, before anything is trained."""

import small_saved

from flax_asr import config, corpora, origins


def _warnings(tmp_path, train, scored):
    cfg = config.build({}, ["--data.language=eu", "--data.eval_splits=[]"])
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
    assert "2 characters of the test clips have no symbol" in said[-1]
    assert "in 3 places of 6" in said[-1]
