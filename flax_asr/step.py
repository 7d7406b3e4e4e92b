"""One update, as pure functions over one named axis of devices.

`accumulate` adds the gradients of one micro-batch to sums that stay on their device; `update`
averages the sums over all clips of all devices and updates the parameters; `update_from` does both
if an update is one micro-batch; `evaluate` scores. The number of devices and the compilation are
parallel.py's concern.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from flax_asr import criterion, optim, partition

Parameters = dict[str, Array | np.ndarray | jax.ShapeDtypeStruct]
"""Parameters by path: arrays on devices or the host, or only shapes."""


@flax.struct.dataclass
class TrainState:
    """The state of a run. The loader's position is `step`, so a resume needs nothing else.

    Attributes:
        step: number of updates done, including skipped ones.
        trainable: parameters with a gradient.
        frozen: all other parameters.
        optimiser: optax's state, for the trainable parameters only.
        loss_scale: the loss scale of fp16.
        key: raw key from which every random number of the run is derived.
        skipped: number of non-finite updates, which changed nothing.
        bad_in_a_row: number of skipped updates in a row up to the last one. In fp16 they count only
            at the smallest loss scale, as otherwise a smaller one could help.
        average: the moving average of the trainable parameters; empty if there is none.
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
    def scored(self) -> dict[str, Any]:
        """The parameters that are scored and exported: the average if there is one.

        For a `partition.Layout.state`, whose leaves are axes instead of arrays, their axes.
        """
        return {**self.trainable, **self.frozen, **self.average}


@flax.struct.dataclass
class Sums:
    """Sums over the micro-batches of one update on one device.

    `loss` is the sum of the clips' losses, and `gradients` the gradients of that sum times the loss
    scale. Clips without an alignment are counted in `infeasible` only. If `micro_batches` is 0,
    `gradients` are meaningless: writing zeros there took a fifth of an update on TPU.
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
        """Sums over no micro-batch; `trainable` may be shapes under `jax.eval_shape`."""
        zero = jnp.float32(0)
        gradients = {path: jnp.zeros(p.shape, jnp.float32) for path, p in trainable.items()}
        return cls(gradients, zero, zero, zero, zero, zero, jnp.int32(0))


class Metrics(NamedTuple):
    """Figures of one update over all devices; `loss` is the mean over its clips.

    `learning_rate` is that of this update, `next_learning_rate` that of the next one.
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


class Rule(NamedTuple):
    """How updates change the parameters; constant during a run.

    Attributes:
        optimiser: the result of `optim.adamw`.
        learning_rate: its schedule, for the figures.
        ema_decay: decay of the moving average; None for no average.
        clips_an_update: divisor of sums over clips; None: the number of clips that counted.
    """

    optimiser: optax.GradientTransformationExtraArgs
    learning_rate: optax.Schedule
    ema_decay: float | None = None
    clips_an_update: int | None = None


def flat(params: PyTree) -> Parameters:
    """A nested tree as a dictionary by path."""
    return flax.traverse_util.flatten_dict(params, sep="/")


def split(params: PyTree, is_trained) -> tuple[Parameters, Parameters]:
    """Splits a nested tree into (trainable, frozen), each by path."""
    every = flat(params)
    trained = {path: leaf for path, leaf in every.items() if is_trained(path)}
    return trained, {path: leaf for path, leaf in every.items() if path not in trained}


def merge(trainable: Parameters, frozen: Parameters) -> PyTree:
    """The inverse of `split`."""
    return flax.traverse_util.unflatten_dict({**trainable, **frozen}, sep="/")


def accumulate(
    objective: criterion.Objective,
    head_only: bool,
    state: TrainState,
    sums: Sums,
    batch: criterion.Batch | criterion.CachedBatch,
) -> Sums:
    """Adds one micro-batch of this device to the sums; with `head_only` only the head's gradient.

    Parameters that are not differentiated cost no backward pass, and their gradient stays zero.
    """
    found = _micro_batch_sums(objective, head_only, state, sums.micro_batches, batch)
    is_first = sums.micro_batches == 0
    before = {path: jnp.where(is_first, 0.0, total) for path, total in sums.gradients.items()}
    added = {path: before[path] + gradient for path, gradient in found.gradients.items()}
    total = jax.tree.map(jnp.add, sums.replace(gradients={}), found.replace(gradients={}))
    return total.replace(gradients={**before, **added})


def _micro_batch_sums(
    objective: criterion.Objective,
    head_only: bool,
    state: TrainState,
    micro_batch: Int[Array, ""] | int,
    batch: criterion.Batch | criterion.CachedBatch,
) -> Sums:
    """The sums of one micro-batch; gradients only of the parameters that are differentiated."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    key = jax.random.fold_in(key, micro_batch)
    key = jax.random.fold_in(key, jax.lax.axis_index(partition.AXIS))

    # fp16 sees the gradient of a mean, as it does in PyTorch: a sum would overflow sooner
    rows = batch.weights.shape[0]
    learning = optim.in_head(state.trainable) if head_only else dict.fromkeys(state.trainable, True)
    held = {path: leaf for path, leaf in state.trainable.items() if not learning[path]}

    def scaled_loss(learnt: Parameters) -> tuple[Float[Array, ""], dict[str, Array]]:
        losses, logits, frame_lengths = criterion.forward(
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
    rule: Rule, axes: partition.Axes, state: TrainState, sums: Sums, *, fresh: bool = False
) -> tuple[TrainState, Sums, Metrics]:
    """Updates the parameters with the mean gradient over the clips of all devices.

    An update with a non-finite gradient changes only the step number, the loss scale and the
    counters. The average starts as the parameters before the first update. If parameters are cut
    along `axes`, a device holds moments and average of its slices only, and updates these. `fresh`
    means that the sums are computed in the same program, as for `partition.norm`.
    """
    total = partition.summed(sums, axes)
    clips = rule.clips_an_update
    if clips is None:
        clips = jnp.maximum(total.clips, 1.0)
    gradients = jax.tree.map(lambda g: g / (clips * state.loss_scale.value), total.gradients)
    norm = partition.norm(gradients, axes, fresh)
    finite = jnp.isfinite(norm)
    old = partition.slices(state.trainable, axes)
    with jax.named_scope("optimiser"):
        moves, optimiser_state = rule.optimiser.update(
            gradients, state.optimiser, old, norm=norm, step=state.step
        )
        moved = optim.select(finite, optax.apply_updates(old, moves), old)
    average = state.average
    if rule.ema_decay is not None:
        average = optax.incremental_update(moved, average, 1.0 - rule.ema_decay)
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
        learning_rate=jnp.asarray(rule.learning_rate(done), jnp.float32),
        # At the end of a schedule, rounding may make the rate slightly negative.
        next_learning_rate=jnp.maximum(jnp.float32(rule.learning_rate(then_done)), 0.0),
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
    objective: criterion.Objective,
    apply: Callable[[TrainState, Sums], tuple[TrainState, Sums, Metrics]],
    state: TrainState,
    batch: criterion.Batch | criterion.CachedBatch,
) -> tuple[TrainState, Metrics]:
    """`accumulate` and `update` for an update of one micro-batch.

    The sums are not written to memory between the two. `apply` is `update` with its rule, axes and
    `fresh`.
    """
    sums = _micro_batch_sums(objective, False, state, 0, batch)
    new, _, metrics = apply(state, sums)
    return new, metrics


def evaluate(
    objective: criterion.Objective, axes: partition.Axes, params: Parameters, batch: criterion.Batch
) -> tuple[Float[Array, " rows"], Int[Array, "rows frames"], Int[Array, " rows"]]:
    """(Loss, most likely symbol of each frame, real frames) of every row of the group.

    Every device gets the results of all devices.
    """
    whole = partition.gathered(params, axes)
    losses, logits, frame_lengths = criterion.forward(objective, merge(whole, {}), batch, None)
    return jax.lax.all_gather(
        (losses, first_maximum(logits), frame_lengths), partition.AXIS, tiled=True
    )


def first_maximum(logits: Float[Array, "... vocab"]) -> Int[Array, "..."]:
    """`jnp.argmax` over the last axis as two plain reductions, 10 times as fast on a CPU."""
    symbols = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    largest = logits.max(axis=-1, keepdims=True)
    return jnp.where(logits == largest, symbols, logits.shape[-1] - 1).min(axis=-1)
