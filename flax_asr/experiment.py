"""Everything that a run is made of, from its configuration: corpus, vocabulary, model, batches."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree
from transformers import Wav2Vec2Config

from flax_asr import checkpoint, compat, config, errors, optim, partition, step, text, vocabulary
from flax_asr.bucket import copies, store
from flax_asr.data import augment, buckets, examples, loader, prepare
from flax_asr.models import configuration, pretrained, wav2vec2, weights
from flax_asr.record import lineage

logger = logging.getLogger(__name__)

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}


@dataclass(frozen=True)
class Origin:
    """Where a model's weights come from.

    Attributes:
        model_config: its configuration, with this run's overrides.
        folder: where the weights are, None for random ones.
        vocabulary: what its head writes, None where it has no head.
        do_normalize: whether clips are brought to zero mean and unit variance.
        use_attention_mask: whether the model is told where clips end.
        facts: for the card.
    """

    model_config: Wav2Vec2Config
    folder: Path | None
    vocabulary: vocabulary.Vocabulary | None
    do_normalize: bool
    use_attention_mask: bool
    facts: dict[str, Any]


@dataclass(frozen=True)
class Corpus:
    """The examples of a run; the scored ones are None where no split is named."""

    normalizer: text.Normalizer
    vocabulary: vocabulary.Vocabulary
    train: examples.Examples
    eval: examples.Examples | None
    test: examples.Examples | None

    def scored(self) -> dict[str, examples.Examples]:
        """Examples to be scored, by the prefix of their figures in the log."""
        named = {"eval": self.eval, "test": self.test}
        return {name: found for name, found in named.items() if found is not None}


def origin(model: config.ModelConfig) -> Origin:
    """Reads what a pretrained folder, run or hub model says about itself.

    Raises:
        ConfigError: an override is not a field of its configuration.
        ModelError: it cannot be read.
    """
    if model.pretrained is None:
        model_config = Wav2Vec2Config()
        folder = revision = None
    else:
        folder, revision = _pretrained_folder(model.pretrained)
        model_config = configuration.read(folder)
    configuration.override(model_config, _overrides(model))
    facts = {
        "started_from": model.pretrained,
        "revision": revision,
        "lineage": lineage.behind(folder) if folder is not None else [],
    }
    return _described(model_config, folder, facts)


def _pretrained_folder(name: str) -> tuple[Path, str | None]:
    """A model's folder and its commit on the hub; of a run, its export."""
    if store.is_remote(name):
        name = str(copies.pretrained(name))
    run = Path(name)
    if not checkpoint.is_run(run):
        return weights.resolve(name)
    if not (run / "export" / "config.json").is_file():
        raise errors.ModelError(
            f"{run} is a run that has not finished: export it first with"
            f" `flax-asr export {run} FOLDER` and give model.pretrained that folder."
        )
    return run / "export", None


def resumed_origin(meta: checkpoint.Meta) -> Origin:
    """What a checkpoint says about its own model."""
    return Origin(
        model_config=Wav2Vec2Config(**meta.model_config),
        folder=None,
        vocabulary=vocabulary.Vocabulary.from_json(meta.vocabulary),
        do_normalize=meta.do_normalize,
        use_attention_mask=meta.use_attention_mask,
        facts={
            name: meta.facts[name]
            for name in ("started_from", "revision", "lineage", "head")
            if name in meta.facts
        },
    )


def _overrides(model: config.ModelConfig) -> dict[str, Any]:
    return {"ctc_loss_reduction": "mean", **model.config}


def _described(model_config: Wav2Vec2Config, folder: Path | None, facts: dict) -> Origin:
    settings = _preprocessor(folder)
    return Origin(
        model_config=model_config,
        folder=folder,
        vocabulary=(
            vocabulary.Vocabulary.from_folder(folder)
            if folder is not None and (folder / "vocab.json").is_file()
            else None
        ),
        do_normalize=bool(settings["do_normalize"]),
        use_attention_mask=(
            model_config.feat_extract_norm == "layer"
            if settings["return_attention_mask"] is None
            else bool(settings["return_attention_mask"])
        ),
        facts=facts,
    )


def _preprocessor(folder: Path | None) -> dict[str, Any]:
    """The settings of a feature extractor, with transformers' defaults."""
    defaults = {"do_normalize": True, "return_attention_mask": None}
    path = folder / "preprocessor_config.json" if folder is not None else None
    if path is None or not path.is_file():
        return defaults
    try:
        return defaults | json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise errors.ModelError(f"{path} cannot be read: {error}") from error


def corpus(cfg: config.Config, start: Origin) -> Corpus:
    """Prepares the splits, makes the vocabulary and encodes the transcripts.

    Raises:
        ConfigError, DataError: what is asked for is not there.
    """
    cfg.require("data.source", "data.language")
    return gather(cfg, start, prepare.prepare(cfg))


def gather(
    cfg: config.Config,
    start: Origin,
    splits: Mapping[str, Any],
    *,
    heeded: Callable[[Any], Iterable[str]] = lambda split: split.sentences,
    usable: Callable[[Any], Any] = lambda split: split,
) -> Corpus:
    """The corpus of splits that are there.

    Args:
        cfg: of the run.
        start: where its weights come from.
        splits: by name, prepared ones or such as only were looked at.
        heeded: the sentences of a split that the vocabulary is made of.
        usable: what of a split has audio; the rest is only held out.

    Raises:
        ConfigError, DataError: nothing can be made of them.
    """
    data = cfg.data
    normalizer = compat.normalizer(cfg)

    def texts(names: Sequence[str]) -> list[str]:
        return [normalizer(sentence) for name in names for sentence in heeded(splits[name])]

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
    cfg: config.Config, start: Origin, texts: Callable[[Sequence[str]], list[str]]
) -> vocabulary.Vocabulary:
    """What is asked for, the pretrained head's where that serves, or the characters of the text.

    Args:
        cfg: of the run.
        start: where its weights come from.
        texts: normalised transcripts of the splits of these names.

    Raises:
        ConfigError, DataError, ModelError: there is none, or it cannot write the transcripts.
    """
    data, semantics = cfg.data, compat.of(cfg)
    if cfg.text.vocabulary is not None:
        found = vocabulary.Vocabulary.from_folder(cfg.text.vocabulary)
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
    return start.vocabulary if keeps_head(cfg.model, start, found) else found


def _check_vocabulary(name: str, found: vocabulary.Vocabulary, texts: Sequence[str]) -> None:
    """Says what of the training text a given vocabulary cannot write.

    Raises:
        ConfigError: it has no token for unknown characters either, or it lacks most of the text.
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


def keeps_head(model: config.ModelConfig, start: Origin, ours: vocabulary.Vocabulary) -> bool:
    """Whether the stored head writes exactly the characters that are needed."""
    if start.vocabulary is None or model.reset_head:
        return False
    spaces = ours.delimiter is None or start.vocabulary.delimiter is not None
    return spaces and start.vocabulary.characters == ours.characters


def initial_model(cfg: config.Config, start: Origin, corpus: Corpus) -> tuple[Origin, PyTree]:
    """The origin with its final configuration, and the parameters to begin with."""
    found = corpus.vocabulary
    kept = start.folder is not None and start.vocabulary == found and not cfg.model.reset_head
    sizes = {"vocab_size": found.size, "pad_token_id": found.blank}
    model_config = Wav2Vec2Config(**(start.model_config.to_dict() | sizes))
    if start.folder is None:
        params = pretrained.fresh(model_config, cfg.seed)
    else:
        loaded = pretrained.load(
            start.folder,
            head_vocab_size=None if kept else found.size,
            config_overrides=_overrides(cfg.model) | sizes,
            seed=cfg.seed,
        )
        model_config, params = loaded.config, loaded.params
        kept = not loaded.fresh_head
    head = "kept" if kept else f"fresh, {found.size} symbols"
    why = (
        "" if kept or start.vocabulary is None else f": {_why_fresh(cfg, start.vocabulary, found)}"
    )
    logger.info("weights from %s; head %s%s", start.folder or "random numbers", head, why)
    return (
        dataclasses.replace(start, model_config=model_config, facts={**start.facts, "head": head}),
        params,
    )


def _why_fresh(
    cfg: config.Config, theirs: vocabulary.Vocabulary, ours: vocabulary.Vocabulary
) -> str:
    if cfg.model.reset_head:
        return "model.reset_head is set"
    lacking = sorted(ours.characters - theirs.characters)
    source = "text.vocabulary" if cfg.text.vocabulary is not None else "the training text"
    shown = f" ({', '.join(map(repr, lacking[:10]))})" if lacking else ""
    return (
        f"its head writes {theirs.size} symbols, the run needs {ours.size}: {len(lacking)} that it"
        f" lacks{shown}, {len(theirs.characters - ours.characters)} that it has for nothing. They"
        f" come from {source}; with text.vocabulary {cfg.model.pretrained} the head would be kept"
    )


def objective(cfg: config.Config, start: Origin) -> step.Objective:
    """The model to differentiate, in the run's precision."""
    train = cfg.train
    module = wav2vec2.Wav2Vec2ForCTCModule(
        start.model_config,
        dtype=DTYPES[train.mixed_precision],
        remat_policy=cfg.model.remat_policy if train.gradient_checkpointing else "none",
        attention=cfg.model.attention,
    )
    return step.Objective(
        module=module,
        config=start.model_config,
        do_normalize=start.do_normalize,
        use_attention_mask=start.use_attention_mask,
    )


def parameter_shapes(model: step.Objective) -> PyTree:
    """Shapes of the nested parameter tree, without computing anything."""
    config = model.config
    samples = buckets.smallest_samples(2, config.conv_kernel, config.conv_stride)
    audio = jax.ShapeDtypeStruct((1, samples), jnp.float32)
    return jax.eval_shape(lambda a: model.module.init(jax.random.key(0), a), audio)["params"]


def fresh_state(
    cfg: config.Config, params: PyTree, optimiser: optax.GradientTransformation
) -> step.TrainState:
    """The state before the first update; parameters may be shapes (under `jax.eval_shape`)."""
    layers = _layer_count(params)
    trainable, frozen = step.split(params, optim.trainable(cfg.model, layers))
    return step.TrainState(
        step=jnp.int32(0),
        trainable=trainable,
        frozen=frozen,
        optimiser=optimiser.init(trainable),
        loss_scale=optim.LossScale.create(cfg.train.mixed_precision),
        key=jax.random.key_data(jax.random.key(cfg.seed)),
        skipped=jnp.int32(0),
        bad_in_a_row=jnp.int32(0),
        average={} if cfg.optim.ema_decay is None else dict(trainable),
    )


def layout(cfg: config.Config, state: step.TrainState, device_count: int) -> partition.Layout:
    """What of a state, of arrays or shapes, is cut over the devices."""
    return partition.layout(state, device_count if cfg.train.zero_sharding else 1)


def _layer_count(params: PyTree) -> int:
    return len(params["wav2vec2"]["encoder"]["layers"])


@dataclass(frozen=True)
class Shapes:
    """The static shapes of a run: padded samples and label tokens of each bucket."""

    samples: tuple[int, ...]
    tokens: tuple[int, ...]

    def __iter__(self):
        return iter(zip(self.samples, self.tokens, strict=True))


def shapes(
    cfg: config.Config,
    model_config: Wav2Vec2Config,
    sets: Sequence[examples.Examples],
    fastest: float = 1.0,
) -> Shapes:
    """At most `num_buckets` shapes that serve all of these sets.

    Augmentation makes no clip longer than they are, and none shorter than by `fastest`.
    """
    samples = buckets.choose_shapes(
        np.concatenate([data.samples for data in sets]),
        cfg.data.num_buckets,
        frame_samples=_frame_samples(model_config),
    )
    widths = [loader.label_widths(data, samples, fastest=fastest) for data in sets]
    return Shapes(samples, tuple(max(column) for column in zip(*widths, strict=True)))


def _frame_samples(model_config: Wav2Vec2Config) -> Callable[[int], int]:
    return functools.partial(
        buckets.smallest_samples,
        kernels=model_config.conv_kernel,
        strides=model_config.conv_stride,
    )


def augmentation(
    cfg: config.Config, model_config: Wav2Vec2Config, data: examples.Examples, shapes: Shapes
) -> augment.Augmentation | None:
    """What is done to the training clips; None where nothing is."""
    if cfg.data.augment == config.AugmentConfig():
        return None
    return augment.Augmentation(
        cfg.data.augment,
        data,
        cfg.seed,
        longest=shapes.samples[-1],
        smallest_samples=_frame_samples(model_config),
        workers=cfg.data.num_workers,
    )


def train_plan(
    cfg: config.Config,
    train: examples.Examples,
    shapes: Sequence[int],
    group_rows: int,
    augmentation: augment.Augmentation | None = None,
) -> buckets.TrainPlan:
    """The batches of a run, whose global batch size is resolved, in groups of so many rows."""
    return buckets.TrainPlan(
        train.samples,
        shapes,
        group_rows,
        cfg.train.global_batch_size // group_rows,
        cfg.seed,
        leaks=compat.of(cfg).leaks,
        lengths=None if augmentation is None else augmentation.lengths,
    )


def total_updates(train: config.TrainConfig, updates_per_epoch: int) -> int:
    """Updates of the whole run."""
    if train.max_steps is not None:
        return train.max_steps
    return int(np.ceil(train.num_train_epochs * updates_per_epoch))
