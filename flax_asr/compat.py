"""`train.compat`: behaviour that makes a run comparable with one made by other software.

Every difference has a name here and is implemented in one place; docs/compat.md explains each.
"""

from dataclasses import dataclass

from flax_asr import config, text

_END = "end_with_space"


@dataclass(frozen=True)
class Semantics:
    """The behaviour that can follow other software; the defaults are this package's own.

    Attributes:
        normalization: the rules if text.normalization is null; None for the language's own.
        ends_with_space: every transcript ends with a space, and so every target with "|".
        layout: order and special tokens of the vocabulary, as `Vocabulary.from_transcripts` has it.
        vocabulary_of_eval: the characters of eval_splits are in the vocabulary too.
        open_bounds: clips exactly as long as data.min_seconds or data.max_seconds are left out.
        leaks: left-over micro-batches of an epoch are added to the next one, as in
            `buckets.TrainPlan`; every update divides by the global batch size.
        hides_bad_losses: the loss in the log is a mean in which non-finite losses do not show.
        logs_next_rate: the learning rate in the log is that of the next update.
        padded_scores: error rates of a run are those of `evaluate.score` with `padded`.
    """

    normalization: str | None = None
    ends_with_space: bool = False
    layout: str = "blank-first"
    vocabulary_of_eval: bool = False
    open_bounds: bool = False
    leaks: bool = False
    hides_bad_losses: bool = False
    logs_next_rate: bool = False
    padded_scores: bool = False


_SEMANTICS = {
    None: Semantics(),
    # The speech recognition example of transformers 4.17 and its Trainer.
    "hf-4.17": Semantics(
        normalization="hf-4.17",
        ends_with_space=True,
        layout="hf-4.17",
        vocabulary_of_eval=True,
        open_bounds=True,
        leaks=True,
        hides_bad_losses=True,
        logs_next_rate=True,
        padded_scores=True,
    ),
}


def of(cfg: config.Config) -> Semantics:
    """The behaviour that the configuration selects."""
    return _SEMANTICS[cfg.train.compat]


def normalizer(cfg: config.Config) -> text.Normalizer:
    """The normaliser of a run's transcripts.

    Raises:
        errors.ConfigError: text.normalization is wrong.
    """
    asked = of(cfg)
    old = asked.normalization if cfg.text.normalization is None else None
    rule = text.normalizer(old or cfg.normalization)
    if not asked.ends_with_space or rule.spec[-1:] == [_END]:
        return rule
    return text.normalizer([*rule.spec, _END])
