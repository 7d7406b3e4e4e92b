"""One update, as pure functions over one named axis of devices.

`accumulate` adds the gradients of one micro-batch to sums that stay on their device; `update`
averages the sums over all clips of all devices, once, and moves the parameters; `update_from` does
both where one micro-batch is all of an update; `evaluate` scores. Nothing here knows how many
devices there are or how it is compiled: parallel.py does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree
from transformers import Wav2Vec2Config

from flax_asr import ctc, optim, partition
from flax_asr.models import masking, upper, wav2vec2

Parameters = dict[str, Array]
"""Arrays by path."""


class Batch(NamedTuple):
    """What the device needs of a micro-batch: `loader.Batch`, field for field."""

    audio: Int[Array, "batch samples"]
    gains: Float[Array, " batch"]
    sample_lengths: Int[Array, " batch"]
    labels: Int[Array, "batch tokens"]
    label_lengths: Int[Array, " batch"]
    weights: Float[Array, " batch"]


class CachedBatch(NamedTuple):
    """The same where what the lower layers give was kept: `loader.CachedBatch`."""

    hidden_state: Float[Array, "batch frames hidden"]
    sample_lengths: Int[Array, " batch"]
    labels: Int[Array, "batch tokens"]
    label_lengths: Int[Array, " batch"]
    weights: Float[Array, " batch"]


@flax.struct.dataclass
class TrainState:
    """All that a resumed run needs, but the loader's position, which is `step`.

    Attributes:
        step: updates done, skipped ones included.
        trainable: parameters with a gradient.
        frozen: the others.
        optimiser: optax's state, of the trainable parameters only.
        loss_scale: of fp16.
        key: raw key that every random number of the run derives from.
        skipped: updates that were not finite and left everything as it was.
        bad_in_a_row: how many of the last updates were skipped without a break. Those that fp16's
            loss scale is still looking for its value with do not count.
        average: the moving average of the trainable parameters; empty where none is kept.
    """

    step: Int[Array, ""]
    trainable: Parameters
    frozen: Parameters
    optimiser: PyTree
    loss_scale: optim.LossScale
    key: Array
    skipped: Int[Array, ""]
    bad_in_a_row: Int[Array, ""]
    average: Parameters

    @property
    def scored(self) -> Parameters:
        """The parameters that evaluation and export look at: averaged ones where there are."""
        return {**self.trainable, **self.frozen, **self.average}


@flax.struct.dataclass
class Sums:
    """What the micro-batches of one update add up to, on one device.

    `loss` is the sum of the clips' losses, `gradients` of that sum times the loss scale. Clips
    without an alignment are in `infeasible` and nowhere else. With no `micro_batches`, whatever
    stands in `gradients` counts for nothing: writing zeros there took a fifth of an update on TPU.
    """

    gradients: Parameters
    loss: Float[Array, ""]
    clips: Float[Array, ""]
    infeasible: Float[Array, ""]
    frames: Float[Array, ""]
    blank_frames: Float[Array, ""]
    micro_batches: Int[Array, ""]

    @classmethod
    def zeros(cls, trainable: Parameters) -> "Sums":
        zero = jnp.float32(0)
        gradients = {path: jnp.zeros(p.shape, jnp.float32) for path, p in trainable.items()}
        return cls(gradients, zero, zero, zero, zero, zero, jnp.int32(0))


class Metrics(NamedTuple):
    """Figures of one update over all devices; `loss` is the mean over its clips.

    `learning_rate` is what it moved with, `next_learning_rate` what the schedule has come to.
    """

    loss: Float[Array, ""]
    learning_rate: Float[Array, ""]
    next_learning_rate: Float[Array, ""]
    grad_norm: Float[Array, ""]
    finite: Bool[Array, ""]
    clips: Float[Array, ""]
    infeasible: Float[Array, ""]
    blank_fraction: Float[Array, ""]
    loss_scale: Float[Array, ""]
    skipped: Int[Array, ""]
    bad_in_a_row: Int[Array, ""]


@flax.struct.dataclass
class Objective:
    """The model and what is asked of it; static, the same for every call.

    Attributes:
        module: the linen module with the CTC head.
        config: its configuration.
        do_normalize: bring every clip to zero mean and unit variance, as it was pretrained.
        use_attention_mask: tell the model where a clip ends; encoders with group normalisation
            were pretrained without.
        lower_layers: how many layers a cached batch has passed; None: batches are audio.
    """

    module: nn.Module = flax.struct.field(pytree_node=False)
    config: Wav2Vec2Config = flax.struct.field(pytree_node=False)
    do_normalize: bool = flax.struct.field(pytree_node=False, default=True)
    use_attention_mask: bool = flax.struct.field(pytree_node=False, default=True)
    lower_layers: int | None = flax.struct.field(pytree_node=False, default=None)

    def on(self, platform: str) -> "Objective":
        """The same, for compilation for a platform that need not be here."""
        return self.replace(module=self.module.clone(platform=platform))


def split(params: PyTree, is_trained) -> tuple[Parameters, Parameters]:
    """A nested tree -> (trainable, frozen), flat."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    trained = {path: leaf for path, leaf in flat.items() if is_trained(path)}
    return trained, {path: leaf for path, leaf in flat.items() if path not in trained}


def merge(trainable: Parameters, frozen: Parameters) -> PyTree:
    """The nested tree of `split`."""
    return flax.traverse_util.unflatten_dict({**trainable, **frozen}, sep="/")


def waveform(batch: Batch, do_normalize: bool) -> Float[Array, "batch samples"]:
    """int16 and gain -> float32; padding is 0 and counts for nothing.

    Source: transformers' Wav2Vec2FeatureExtractor: (x - mean) / sqrt(variance + 1e-7), each clip
    before it is padded.
    """
    real = jnp.arange(batch.audio.shape[1]) < batch.sample_lengths[:, None]
    audio = jnp.where(real, batch.audio.astype(jnp.float32) * batch.gains[:, None], 0.0)
    if not do_normalize:
        return audio
    count = jnp.maximum(batch.sample_lengths, 1)[:, None].astype(jnp.float32)
    centred = jnp.where(real, audio - audio.sum(axis=1, keepdims=True) / count, 0.0)
    variance = jnp.square(centred).sum(axis=1, keepdims=True) / count
    return centred * jax.lax.rsqrt(variance + 1e-7)


def accumulate(
    objective: Objective, head_only: bool, state: TrainState, sums: Sums, batch: Batch | CachedBatch
) -> Sums:
    """Adds one micro-batch of this device to the sums; with `head_only` the head's gradient only.

    What is not differentiated costs no backward pass, and its gradient stays what it is: zero.
    """
    found = _found(objective, head_only, state, sums.micro_batches, batch)
    is_first = sums.micro_batches == 0
    before = {path: jnp.where(is_first, 0.0, total) for path, total in sums.gradients.items()}
    added = {path: before[path] + gradient for path, gradient in found.gradients.items()}
    total = jax.tree.map(jnp.add, sums.replace(gradients={}), found.replace(gradients={}))
    return total.replace(gradients={**before, **added})


def _found(
    objective: Objective,
    head_only: bool,
    state: TrainState,
    micro_batch: Int[Array, ""] | int,
    batch: Batch | CachedBatch,
) -> Sums:
    """What one micro-batch alone adds up to; only of what is differentiated there are gradients."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    key = jax.random.fold_in(key, micro_batch)
    key = jax.random.fold_in(key, jax.lax.axis_index(partition.AXIS))

    # fp16 sees the gradient of a mean, as it does in PyTorch: a sum would overflow sooner
    rows = batch.weights.shape[0]
    learning = optim.in_head(state.trainable) if head_only else dict.fromkeys(state.trainable, True)
    held = {path: leaf for path, leaf in state.trainable.items() if not learning[path]}

    def scaled_loss(learnt: Parameters) -> tuple[Float[Array, ""], dict[str, Array]]:
        losses, logits, frame_lengths = _forward(
            objective, merge({**learnt, **held}, state.frozen), batch, key
        )
        infeasible = jnp.isposinf(losses) & (batch.weights > 0)
        weights = jnp.where(infeasible, 0.0, batch.weights)
        loss = jnp.sum(jnp.where(weights > 0, losses, 0.0) * weights)
        real = jnp.arange(logits.shape[1]) < frame_lengths[:, None]
        blank = logits[..., objective.config.pad_token_id] >= logits.max(axis=-1)
        return loss / rows * state.loss_scale.value, {
            "loss": loss,
            "clips": weights.sum(),
            "infeasible": infeasible.sum(dtype=jnp.float32),
            "frames": real.sum(dtype=jnp.float32),
            "blank_frames": (real & blank).sum(dtype=jnp.float32),
        }

    learnt = {path: leaf for path, leaf in state.trainable.items() if learning[path]}
    gradients, counts = jax.grad(scaled_loss, has_aux=True)(learnt)
    return Sums(
        gradients={path: rows * g.astype(jnp.float32) for path, g in gradients.items()},
        micro_batches=jnp.int32(1),
        **counts,
    )


def update(
    optimiser: optax.GradientTransformationExtraArgs,
    learning_rate: optax.Schedule,
    ema_decay: float | None,
    axes: partition.Axes,
    state: TrainState,
    sums: Sums,
    *,
    clips_an_update: int | None = None,
    fresh: bool = False,
) -> tuple[TrainState, Sums, Metrics]:
    """Moves the parameters by the mean gradient over the clips of all devices.

    An update whose gradient is not finite changes the step number, the loss scale and the
    counters, and nothing else. The average becomes `ema_decay` of itself and the rest of the new
    parameters; it starts as the parameters before the first update. With `clips_an_update` sums
    are divided by so many clips, however many there are. Where parameters are cut along `axes`, a
    device holds moments and average of its slices only and moves these. With `fresh` the sums are
    computed in the same program, and squared there for their norm.
    """
    total = partition.summed(sums, axes)
    clips = jnp.maximum(total.clips, 1.0) if clips_an_update is None else clips_an_update
    gradients = jax.tree.map(lambda g: g / (clips * state.loss_scale.value), total.gradients)
    norm = partition.norm(gradients, axes, fresh)
    finite = jnp.isfinite(norm)
    old = partition.slices(state.trainable, axes)
    with jax.named_scope("optimiser"):
        moves, optimiser_state = optimiser.update(
            gradients, state.optimiser, old, norm=norm, step=state.step
        )
        moved = optim.select(finite, optax.apply_updates(old, moves), old)
    average = state.average
    if ema_decay is not None:
        average = optax.incremental_update(moved, average, 1.0 - ema_decay)
    bad_in_a_row = jnp.where(finite, 0, state.bad_in_a_row + state.loss_scale.is_smallest)
    new = state.replace(
        step=state.step + 1,
        trainable=partition.gathered(moved, axes),
        optimiser=optim.select(finite, optimiser_state, state.optimiser),
        loss_scale=state.loss_scale.after(finite),
        skipped=state.skipped + ~finite,
        bad_in_a_row=bad_in_a_row,
        average=optim.select(finite, average, state.average),
    )
    done, then_done = (count.step - count.skipped for count in (state, new))
    metrics = Metrics(
        loss=total.loss / clips,
        learning_rate=jnp.asarray(learning_rate(done), jnp.float32),
        # At the end of a schedule rounding may leave it a little below zero.
        next_learning_rate=jnp.maximum(jnp.float32(learning_rate(then_done)), 0.0),
        grad_norm=norm,
        finite=finite,
        clips=total.clips,
        infeasible=total.infeasible,
        blank_fraction=total.blank_frames / jnp.maximum(total.frames, 1.0),
        loss_scale=state.loss_scale.value,
        skipped=new.skipped,
        bad_in_a_row=bad_in_a_row,
    )
    empty = jax.tree.map(jnp.zeros_like, sums.replace(gradients={}))
    return new, empty.replace(gradients=sums.gradients), metrics


def update_from(
    objective: Objective,
    update: Callable[..., tuple[TrainState, Sums, Metrics]],
    state: TrainState,
    batch: Batch | CachedBatch,
) -> tuple[TrainState, Metrics]:
    """`accumulate` and `update` of the only micro-batch of an update.

    No sums cross the memory between the two.
    """
    new, _, metrics = update(state, _found(objective, False, state, 0, batch), fresh=True)
    return new, metrics


def evaluate(
    objective: Objective, axes: partition.Axes, params: Parameters, batch: Batch
) -> tuple[Float[Array, " rows"], Int[Array, "rows frames"], Int[Array, " rows"]]:
    """(loss, most likely symbol of each frame, frames) of every row of the group, everywhere."""
    whole = partition.gathered(params, axes)
    losses, logits, frame_lengths = _forward(objective, merge(whole, {}), batch, None)
    return jax.lax.all_gather(
        (losses, first_maximum(logits), frame_lengths), partition.AXIS, tiled=True
    )


def first_maximum(logits: Float[Array, "... vocab"]) -> Int[Array, "..."]:
    """`jnp.argmax` over the last axis as two plain reductions, 10 times as fast on a CPU."""
    symbols = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    largest = logits.max(axis=-1, keepdims=True)
    return jnp.where(logits == largest, symbols, logits.shape[-1] - 1).min(axis=-1)


def lower(
    objective: Objective, params: Parameters, batch: Batch
) -> Float[Array, "batch frames hidden"]:
    """What the lower layers give of every row, without anything random; see `CachedBatch`."""
    audio, attention_mask = _heard(objective, batch)
    outputs = objective.module.apply(
        {"params": merge(params, {})}, audio, attention_mask, output_hidden_states=True
    )
    return outputs.hidden_states[objective.lower_layers]


def _forward(
    objective: Objective, params: PyTree, batch: Batch | CachedBatch, key: Any
) -> tuple[Float[Array, " batch"], Float[Array, "batch frames vocab"], Int[Array, " batch"]]:
    """Losses, logits and real frames of a batch; with a key, dropout and masks as in training."""
    config = objective.config
    frame_lengths = wav2vec2.frame_lengths(config, batch.sample_lengths)
    through = _through_upper if isinstance(batch, CachedBatch) else _through_all
    logits = through(objective, params, batch, frame_lengths, key)
    losses = ctc.ctc_loss(
        logits, frame_lengths, batch.labels, batch.label_lengths, blank=config.pad_token_id
    )
    if config.ctc_loss_reduction == "mean":
        losses = losses / jnp.maximum(batch.label_lengths, 1)
    return losses, logits, frame_lengths


def _heard(
    objective: Objective, batch: Batch
) -> tuple[Float[Array, "batch samples"], Bool[Array, "batch samples"] | None]:
    """The audio as the model takes it, and where it is told that clips end."""
    audio = waveform(batch, objective.do_normalize)
    if not objective.use_attention_mask:
        return audio, None
    return audio, jnp.arange(audio.shape[1]) < batch.sample_lengths[:, None]


def _through_all(objective, params, batch: Batch, frame_lengths, key):
    """Logits of audio."""
    config = objective.config
    audio, attention_mask = _heard(objective, batch)
    frames = int(wav2vec2.frame_lengths(config, audio.shape[1]))
    time_mask = feature_mask = rngs = None
    if key is not None:
        dropout_key, time_key, feature_key = jax.random.split(key, 3)
        rngs = {"dropout": dropout_key}
        if config.apply_spec_augment and config.mask_time_prob > 0:
            time_mask = masking.time_mask(
                time_key,
                frame_lengths
                if objective.use_attention_mask
                else jnp.full_like(frame_lengths, frames),
                frames,
                prob=config.mask_time_prob,
                length=config.mask_time_length,
                min_spans=config.mask_time_min_masks,
            )
        if config.apply_spec_augment and config.mask_feature_prob > 0:
            feature_mask = masking.feature_mask(
                feature_key,
                audio.shape[0],
                config.hidden_size,
                prob=config.mask_feature_prob,
                length=config.mask_feature_length,
                min_spans=config.mask_feature_min_masks,
            )
    return objective.module.apply(
        {"params": params},
        audio,
        attention_mask=attention_mask,
        mask_time_indices=time_mask,
        mask_feature_indices=feature_mask,
        deterministic=key is None,
        rngs=rngs,
    ).logits


def _through_upper(objective, params, batch: CachedBatch, frame_lengths, key):
    """Logits of what the lower layers gave, with the dropout that the whole model would draw."""
    frames = batch.hidden_state.shape[1]
    return upper.of(objective.module, objective.lower_layers).apply(
        {"params": params},
        batch.hidden_state,
        jnp.arange(frames) < frame_lengths[:, None],
        deterministic=key is None,
        rngs=None if key is None else {"dropout": jax.random.split(key, 3)[0]},
    )
