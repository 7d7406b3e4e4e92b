"""What a configuration makes of a model and a corpus: first weights, state, shapes, batch plan."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int32, PyTree
from transformers import Wav2Vec2Config

from flax_asr import (
    compat,
    config,
    corpora,
    criterion,
    errors,
    optim,
    origins,
    partition,
    step,
    vocabulary,
)
from flax_asr.data import augment, buckets, examples, loader
from flax_asr.models import pretrained, wav2vec2

logger = logging.getLogger(__name__)

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}


def initial_model(
    cfg: config.Config, start: origins.Origin, data: corpora.Corpus
) -> tuple[origins.Origin, PyTree]:
    """The origin with its final configuration, and the parameters to begin with.

    Raises:
        ConfigError: more layers are to be trained than there are.
        ModelError: the weights cannot be read.
    """
    layers = start.model_config.num_hidden_layers
    if (cfg.model.trainable_layers or 0) > layers:
        raise errors.ConfigError(
            f"model.trainable_layers is {cfg.model.trainable_layers}: the encoder has {layers}."
        )
    found = data.vocabulary
    kept, stored = keeps_head(cfg, start, found), False
    model_config = start.sized(found).model_config
    if start.folder is None:
        params = pretrained.fresh(model_config, cfg.seed)
    else:
        loaded = pretrained.load(
            start.folder,
            head_vocab_size=None if kept else found.size,
            config_overrides=origins.overrides(cfg.model)
            | {"vocab_size": found.size, "pad_token_id": found.blank},
            seed=cfg.seed,
        )
        model_config, params = loaded.config, loaded.params
        kept, stored = not loaded.fresh_head, loaded.stored_head
    head = "kept" if kept else f"fresh, {found.size} symbols"
    why = ""
    # An encoder may have a vocabulary, as facebook/wav2vec2-base does, and no head.
    if stored and not kept and start.vocabulary is not None:
        why = f": {_why_fresh(cfg, start.vocabulary, found)}"
    logger.info("weights from %s; head %s%s", start.folder or "random numbers", head, why)
    return (
        dataclasses.replace(start, model_config=model_config, facts={**start.facts, "head": head}),
        params,
    )


def keeps_head(cfg: config.Config, start: origins.Origin, ours: vocabulary.Vocabulary) -> bool:
    """Whether the run goes on with the stored head: it writes the run's symbols."""
    return start.folder is not None and start.vocabulary == ours and not cfg.model.reset_head


def _why_fresh(
    cfg: config.Config, theirs: vocabulary.Vocabulary, ours: vocabulary.Vocabulary
) -> str:
    if cfg.model.reset_head:
        return "model.reset_head is set"
    lacking = sorted(ours.characters - theirs.characters)
    source = "text.vocabulary" if cfg.text.vocabulary is not None else "the training text"
    shown = f" ({', '.join(map(repr, lacking[:10]))})" if lacking else ""
    return (
        f"its head writes {theirs.size} symbols, the run needs {ours.size}: it lacks"
        f" {len(lacking)} of them{shown}, and has {len(theirs.characters - ours.characters)} that"
        f" the run does not need. These come from {source}; with text.vocabulary"
        f" {cfg.model.pretrained} the head would be kept"
    )


def objective(cfg: config.Config, start: origins.Origin) -> criterion.Objective:
    """The model to differentiate, in the run's precision."""
    train = cfg.train
    module = wav2vec2.Wav2Vec2ForCTCModule(
        start.model_config,
        dtype=DTYPES[train.mixed_precision],
        remat_policy=cfg.model.remat_policy if train.gradient_checkpointing else "none",
        attention=cfg.model.attention,
    )
    return criterion.Objective(
        module=module,
        config=start.model_config,
        do_normalize=start.do_normalize,
        use_attention_mask=start.use_attention_mask,
        lower_layers=_lower_layers(cfg, start.model_config),
    )


def _lower_layers(cfg: config.Config, model_config: Wav2Vec2Config) -> int | None:
    """How many layers a training batch has behind it; None: it is audio."""
    if not cfg.data.cache_features or cfg.model.trainable_layers is None:
        return None
    return optim.first_trained_layer(cfg.model, model_config.num_hidden_layers)


def parameter_shapes(model: criterion.Objective) -> PyTree:
    """Shapes of the nested parameter tree, without computing anything."""
    audio = jax.ShapeDtypeStruct((1, frame_samples(model.config)(2)), jnp.float32)
    # Attention has the same parameters in every form, and one of a GPU is refused elsewhere.
    module = model.module.clone(attention="xla")
    return jax.eval_shape(lambda a: module.init(jax.random.key(0), a), audio)["params"]


def fresh_state(
    cfg: config.Config,
    model_config: Wav2Vec2Config,
    params: PyTree,
    optimiser: optax.GradientTransformation,
) -> step.TrainState:
    """The state before the first update; parameters may be shapes (under `jax.eval_shape`)."""
    trainable, frozen = step.split(params, optim.trainable(cfg.model, model_config))
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


@dataclass(frozen=True)
class Shapes:
    """The static shapes of a run: padded samples and label tokens of each bucket, ascending."""

    samples: tuple[int, ...]
    tokens: tuple[int, ...]

    def __iter__(self):
        return iter(zip(self.samples, self.tokens, strict=True))

    @property
    def largest(self) -> tuple[int, int]:
        """Samples and tokens of the largest one."""
        return self.samples[-1], self.tokens[-1]


def shapes(
    cfg: config.Config,
    model_config: Wav2Vec2Config,
    train: examples.Examples,
) -> Shapes:
    """At most `num_buckets` shapes for training on these examples.

    Augmentation makes no clip longer than they are; labels fit where it makes clips shorter.
    """
    return _shapes(cfg.data.num_buckets, model_config, [train], cfg.data.augment.fastest)


def scoring_shapes(
    cfg: config.Config, model_config: Wav2Vec2Config, sets: Sequence[examples.Examples]
) -> Shapes:
    """At most `scoring_buckets` shapes for scoring all of these sets; none for no sets."""
    if not sets:
        return Shapes((), ())
    return _shapes(scoring_buckets(cfg.data.num_buckets), model_config, sets)


def scoring_buckets(num_buckets: int) -> int:
    """Half as many as for training.

    Clips are scored a few times where they are trained on for many epochs: what is saved in
    compilation is worth more than the padding.
    """
    return math.ceil(num_buckets / 2)


def _shapes(
    count: int,
    model_config: Wav2Vec2Config,
    sets: Sequence[examples.Examples],
    fastest: float = 1.0,
) -> Shapes:
    samples = buckets.choose_shapes(
        np.concatenate([data.samples for data in sets]),
        count,
        frame_samples=frame_samples(model_config),
    )
    widths = [loader.label_widths(data, samples, fastest=fastest) for data in sets]
    return Shapes(samples, tuple(max(column) for column in zip(*widths, strict=True)))


def frame_samples(model_config: Wav2Vec2Config) -> Callable[[int], int]:
    """What tells the fewest samples from which the model makes so many frames."""
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
        smallest_samples=frame_samples(model_config),
        workers=cfg.data.num_workers,
    )


def train_plan(
    cfg: config.Config,
    samples: Int32[np.ndarray, " clips"],
    shapes: Sequence[int],
    group_rows: int,
    augmentation: augment.Augmentation | None = None,
) -> buckets.TrainPlan:
    """The batches of a run, whose global batch size is resolved, in groups of so many rows."""
    return buckets.TrainPlan(
        samples,
        shapes,
        group_rows,
        cfg.train.global_batch_size // group_rows,
        cfg.seed,
        leaks=compat.of(cfg).leaks,
        lengths=None if augmentation is None else augmentation.lengths,
    )


def rule(cfg: config.Config, updates: int) -> step.Rule:
    """How a run of so many updates, whose global batch size is resolved, moves its parameters."""
    learning_rate = optim.schedule(cfg.optim, updates)
    return step.Rule(
        optim.adamw(cfg.optim, learning_rate, cfg.model.freeze_encoder_steps),
        learning_rate,
        cfg.optim.ema_decay,
        cfg.train.global_batch_size if compat.of(cfg).leaks else None,
    )


def updates_at_once(cfg: config.Config, device_count: int) -> bool:
    """Whether every update is one micro-batch, and one program: `step.update_from`.

    While the encoder waits for the head the update is a program of its own.
    """
    at_once = device_count * cfg.train.per_device_train_batch_size
    return cfg.train.global_batch_size == at_once and not cfg.model.freeze_encoder_steps


def total_updates(train: config.TrainConfig, updates_per_epoch: int) -> int:
    """Updates of the whole run."""
    if train.max_steps is not None:
        return train.max_steps
    return int(np.ceil(train.num_train_epochs * updates_per_epoch))
