"""`train.compat`: what a run does otherwise to be compared with one that was made elsewhere.

Every difference has a name here and is asked for by that name in one place; docs/compat.md says
what each changes.
"""

from dataclasses import dataclass

from flax_asr import config, text

_END = "end_with_space"


@dataclass(frozen=True)
class Semantics:
    """In what a run may follow another program; the defaults are what it does by itself.

    Attributes:
        normalization: the rule where text.normalization is null; None for the language's own.
        ends_with_space: every transcript ends with a space, and so every target with "|".
        layout: order and special tokens of the vocabulary, as `Vocabulary.from_transcripts` has it.
        vocabulary_of_eval: the characters of eval_splits are in the vocabulary too.
        open_bounds: clips exactly as long as data.min_seconds or data.max_seconds are left out.
        leaks: what fills no update at the end of an epoch joins the next, as in
            `buckets.TrainPlan`; an update divides by the global batch size whatever is in it.
        hides_bad_losses: the loss in the log is a mean in which bad ones do not show.
        logs_next_rate: the learning rate in the log is that of the update after the line.
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
    """What the configuration asks for."""
    return _SEMANTICS[cfg.train.compat]


def normalizer(cfg: config.Config) -> text.Normalizer:
    """The rule of a run's transcripts.

    Raises:
        errors.ConfigError: text.normalization is wrong.
    """
    asked = of(cfg)
    old = asked.normalization if cfg.text.normalization is None else None
    rule = text.normalizer(old or cfg.normalization)
    if not asked.ends_with_space or rule.spec[-1:] == [_END]:
        return rule
    return text.normalizer([*rule.spec, _END])
