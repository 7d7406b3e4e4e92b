"""When a run ends because its scores no longer get better."""

import pytest

from flax_asr import config, early_stopping, errors


def test_patience_is_a_number_of_evaluations_without_a_better_score():
    def history(*scores):
        return [{"step": step, "eval_clips": 1, "eval_cer": cer} for step, cer in enumerate(scores)]

    def is_over(patience, *scores):
        train = config.TrainConfig(early_stopping_patience=patience)
        return early_stopping.is_due(history(*scores), train)

    assert not is_over(2, 0.5, 0.5)
    assert is_over(2, 0.5, 0.5, 0.6)
    assert not is_over(2, 0.5, 0.6, 0.4)
    assert not is_over(None, 0.5, 0.5, 0.5)
    assert not is_over(1)


def test_patience_without_scores_is_refused():
    cfg = config.load(None, ["--train.early_stopping_patience=2", "--data.eval_splits=[]"])
    with pytest.raises(errors.ConfigError, match=r"patience is 2, but data\.eval_splits is empty"):
        early_stopping.check(cfg)
    early_stopping.check(config.load(None, ["--train.early_stopping_patience=2"]))
    early_stopping.check(config.load(None, ["--data.eval_splits=[]"]))
