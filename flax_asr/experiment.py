"""A run's parts as its configuration asks for them: objective, state, batch plan, update rule."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int32, PyTree
from transformers import Wav2Vec2Config

from flax_asr import compat, config, criterion, optim, origins, partition, static_shapes, step
from flax_asr.data import augment, buckets, examples
from flax_asr.models import wav2vec2

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}


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
    """The number of layers whose output is a training batch; None if it is audio."""
    if not cfg.data.cache_features or cfg.model.trainable_layers is None:
        return None
    return optim.first_trained_layer(cfg.model, model_config.num_hidden_layers)


def parameter_shapes(model: criterion.Objective) -> PyTree:
    """The nested tree of parameters as shapes, without computing anything."""
    audio = jax.ShapeDtypeStruct((1, static_shapes.frame_samples(model.config)(2)), jnp.float32)
    # All implementations of attention have the same parameters, but some only work on a GPU.
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
    """Which arrays of a state (of arrays or shapes) are cut over the devices."""
    return partition.layout(state, device_count if cfg.train.zero_sharding else 1)


def augmentation(
    cfg: config.Config,
    model_config: Wav2Vec2Config,
    data: examples.Examples,
    shapes: static_shapes.Shapes,
) -> augment.Augmentation | None:
    """The augmentation of the training clips; None if there is none."""
    if cfg.data.augment == config.AugmentConfig():
        return None
    return augment.Augmentation(
        cfg.data.augment,
        data,
        cfg.seed,
        longest=shapes.samples[-1],
        smallest_samples=static_shapes.frame_samples(model_config),
        workers=cfg.data.num_workers,
    )


def train_plan(
    cfg: config.Config,
    samples: Int32[np.ndarray, " clips"],
    shapes: Sequence[int],
    group_rows: int,
    augmentation: augment.Augmentation | None = None,
) -> buckets.TrainPlan:
    """The batches of a run, in groups of so many rows; its global batch size must be resolved."""
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
    """The update rule of a run of so many updates; its global batch size must be resolved."""
    learning_rate = optim.schedule(cfg.optim, updates)
    return step.Rule(
        optim.adamw(cfg.optim, learning_rate, cfg.model.freeze_encoder_steps),
        learning_rate,
        cfg.optim.ema_decay,
        cfg.train.global_batch_size if compat.of(cfg).leaks else None,
    )


def updates_at_once(cfg: config.Config, device_count: int) -> bool:
    """Whether every update is one micro-batch, computed by one program: `step.update_from`.

    With `model.freeze_encoder_steps` the update always has a program of its own.
    """
    at_once = device_count * cfg.train.per_device_train_batch_size
    return cfg.train.global_batch_size == at_once and not cfg.model.freeze_encoder_steps


def total_updates(train: config.TrainConfig, updates_per_epoch: int) -> int:
    """The number of updates of the whole run."""
    if train.max_steps is not None:
        return train.max_steps
    return int(np.ceil(train.num_train_epochs * updates_per_epoch))
