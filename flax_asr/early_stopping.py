"""Early stopping: a run ends after several evaluations without a better score."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax_asr import config, errors
from flax_asr.record import runlog


def check(cfg: config.Config) -> None:
    """Raises `ConfigError` if early stopping is on and nothing is evaluated."""
    patience = cfg.train.early_stopping_patience
    if patience is not None and not cfg.data.eval_splits:
        raise errors.ConfigError(
            f"train.early_stopping_patience is {patience}, but data.eval_splits is empty: name a"
            " split, or leave the patience out."
        )


def is_due(history: Sequence[Mapping[str, Any]], train: config.TrainConfig) -> bool:
    """Whether the allowed number of evaluations in a row brought no better score.

    Args:
        history: the events of the log.
        train: which score, and how many evaluations.
    """
    if train.early_stopping_patience is None:
        return False
    name = f"eval_{train.metric_for_best_model}"
    return runlog.evaluations_since_best(history, name) >= train.early_stopping_patience
