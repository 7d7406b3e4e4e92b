"""The data of a run: examples to train on and to score, and the vocabulary they share."""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flax_asr import compat, config, errors, origins, text, vocabulary
from flax_asr.data import examples, prepare, shards
from flax_asr.models import wav2vec2

logger = logging.getLogger(__name__)

_Split = TypeVar("_Split", bound=examples.Split)


@dataclass(frozen=True)
class Corpus:
    """The examples of a run; `eval` and `test` are None if they have no splits."""

    normalizer: text.Normalizer
    vocabulary: vocabulary.Vocabulary
    train: examples.Examples
    eval: examples.Examples | None
    test: examples.Examples | None

    def sets(self) -> dict[str, examples.Examples]:
        """All sets of examples, by their names in reports."""
        return {"train": self.train, **self.scored()}

    def scored(self) -> dict[str, examples.Examples]:
        """Scored sets, by the prefix of their scores in the log."""
        named = {"eval": self.eval, "test": self.test}
        return {name: found for name, found in named.items() if found is not None}

    def warnings(self) -> Iterator[str]:
        """Warnings about what would make scores misleading."""
        trained_on = set(self.train.ids)
        for name, data in self.scored().items():
            known = trained_on & set(data.ids)
            if known:
                yield (
                    f"{len(known)} of the {len(data)} {name} clips are trained on: their scores say"
                    " nothing of speech that the model has not heard."
                )
            lacking = self.vocabulary.lacks(data.references)
            if lacking:
                heard = set().union(*self.train.references)
                why = "" if heard & lacking.keys() else ", as training does not have them"
                yield (
                    f"{len(lacking)} characters of the {name} clips have no symbol{why}; in"
                    f" {lacking.total()} places of {sum(map(len, data.references))}, each of which"
                    f" is an error: {text.shown(lacking)}"
                )

    def splits(self) -> list[shards.PreparedSplit]:
        """The splits that hold the audio; a split that is used twice is listed twice."""
        return [split for data in self.sets().values() for split in data.splits]


def prepared(cfg: config.Config, start: origins.Origin) -> Corpus:
    """Prepares the splits, makes the vocabulary and encodes the transcripts.

    Raises:
        ConfigError, DataError: a split or the vocabulary cannot be used.
    """
    cfg.require("data.source", "data.language")
    return gather(cfg, start, prepare.prepare(cfg))


def gather(
    cfg: config.Config,
    start: origins.Origin,
    splits: Mapping[str, _Split],
    *,
    vocabulary_sentences: Callable[[_Split], Iterable[str]] = lambda split: split.sentences,
    usable: Callable[[_Split], examples.Split] = lambda split: split,
) -> Corpus:
    """The corpus of given splits.

    Args:
        cfg: the configuration of the run.
        start: where its weights come from.
        splits: splits by name, prepared or only surveyed by `doctor`.
        vocabulary_sentences: gives the sentences of a split from which the vocabulary is made.
        usable: gives the part of a split that has audio; the rest only counts as held out.

    Raises:
        ConfigError, DataError: no clip or no vocabulary is left.
    """
    data = cfg.data
    if not data.train_splits:
        raise errors.ConfigError("data.train_splits names no split: there is nothing to train on.")
    normalizer = compat.normalizer(cfg)

    def texts(names: Sequence[str]) -> list[str]:
        return [
            normalizer(sentence)
            for name in names
            for sentence in vocabulary_sentences(splits[name])
        ]

    found = _vocabulary(cfg, start, texts)
    scored_names = dict.fromkeys((*data.eval_splits, *data.test_splits))
    held_out = [splits[n] for n in scored_names if n not in data.train_splits]

    def build(names: Sequence[str], **options: Any) -> examples.Examples | None:
        if not names:
            return None
        return examples.build(
            [usable(splits[name]) for name in names],
            normalize=normalizer,
            vocabulary=found,
            frame_lengths=functools.partial(wav2vec2.frame_lengths, start.model_config),
            seed=cfg.seed,
            between=(data.min_seconds, data.max_seconds) if compat.of(cfg).open_bounds else None,
            **options,
        )

    return Corpus(
        normalizer=normalizer,
        vocabulary=found,
        train=build(
            data.train_splits,
            exclude=held_out if "validated" in data.train_splits else (),
            max_clips=data.max_train_clips,
        ),
        eval=build(data.eval_splits, max_clips=data.max_eval_clips),
        test=build(data.test_splits, max_clips=data.max_eval_clips),
    )


def _vocabulary(
    cfg: config.Config, start: origins.Origin, texts: Callable[[Sequence[str]], list[str]]
) -> vocabulary.Vocabulary:
    """The vocabulary that is asked for, that of the pretrained head, or the characters of the text.

    Args:
        cfg: the configuration of the run.
        start: where its weights come from.
        texts: normalised transcripts of the splits of these names.

    Raises:
        ConfigError, DataError, ModelError: there is none, or it lacks most of the transcripts.
    """
    data, semantics = cfg.data, compat.of(cfg)
    if cfg.text.vocabulary is not None:
        found = _named_vocabulary(cfg.text.vocabulary, start)
        _check_vocabulary(cfg.text.vocabulary, found, texts(data.train_splits))
        return found
    found = vocabulary.Vocabulary.from_transcripts(
        texts([*data.train_splits, *(data.eval_splits if semantics.vocabulary_of_eval else ())]),
        min_count=cfg.text.min_count,
        layout=semantics.layout,
    )
    if cfg.text.min_count > 1:
        rare = found.lacks(texts(data.train_splits))
        logger.info(
            "text.min_count %d: %d characters of the training text, in %d places, have no symbol:"
            " %s",
            cfg.text.min_count,
            len(rare),
            rare.total(),
            text.shown(rare),
        )
    return start.vocabulary if _serves(cfg.model, start, found) else found


def _named_vocabulary(name: str, start: origins.Origin) -> vocabulary.Vocabulary:
    """The vocabulary that `text.vocabulary` names, or the checkpoint's if that is gone."""
    try:
        return origins.symbols(name)
    except errors.ModelError as error:
        if not start.is_checkpoint:
            raise
        logger.warning(
            "warning: text.vocabulary cannot be read again, the run goes on with the symbols of its"
            " checkpoint: %s",
            error,
        )
        return start.vocabulary


def _check_vocabulary(name: str, found: vocabulary.Vocabulary, texts: Sequence[str]) -> None:
    """Reports characters of the training text that a given vocabulary lacks.

    Raises:
        ConfigError: it has no token for unknown characters, or lacks most of the text.
    """
    lacking = found.lacks(texts)
    if not lacking:
        return
    places = sum(map(len, texts))
    what = (
        f"text.vocabulary {name} has no symbol for {len(lacking)} characters of the training text,"
        f" in {lacking.total()} places of {places}: {text.shown(lacking)}"
    )
    mend = "Change text.normalization, add them, or leave text.vocabulary out."
    if found.unknown is None:
        raise errors.ConfigError(f"{what}; and no token for unknown characters. {mend}")
    if lacking.total() > places / 2:
        raise errors.ConfigError(f"{what}; it is that of another language or spelling. {mend}")
    logger.warning("warning: %s. They become %s. %s", what, found.tokens[found.unknown], mend)


def _serves(model: config.ModelConfig, start: origins.Origin, ours: vocabulary.Vocabulary) -> bool:
    """Whether the pretrained head has exactly the characters that are needed."""
    if start.vocabulary is None or model.reset_head:
        return False
    spaces = ours.delimiter is None or start.vocabulary.delimiter is not None
    return spaces and start.vocabulary.characters == ours.characters
