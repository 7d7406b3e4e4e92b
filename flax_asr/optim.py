"""AdamW, its schedules, and which parameters are trained.

Composes optax's transformations. Parameters are flat dictionaries by path, for example
`wav2vec2/encoder/layers/0/attention/q_proj/kernel`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from flax_asr import config

LARGEST_LOSS_SCALE = 2.0**24
SMALLEST_LOSS_SCALE = 1.0
GROWTH_INTERVAL = 2000
TRI_STAGE_START, TRI_STAGE_END = 0.01, 0.05
"""Start and end of `tri_stage`, as fractions of the peak rate.

Source: fairseq's TriStageLRScheduleConfig (init_lr_scale), and the final_lr_scale of its
wav2vec 2.0 fine-tuning recipes.
"""
HEAD = "lm_head/"


def schedule(optim: config.OptimConfig, updates: int) -> optax.Schedule:
    """The learning rate of every update, counted from 0.

    A linear rise from 0, then `linear` falls to 0 at `updates`, `cosine` falls there along half a
    cosine, `constant` stays. `tri_stage` rises from a hundredth of the peak, holds, and decays
    exponentially to a twentieth.

    Source: transformers' get_linear_schedule_with_warmup and its siblings, which are also the
    oracle; for `tri_stage`, fairseq's TriStageLRSchedule.
    """
    peak = optim.learning_rate
    warmup = optim.warmup_updates(updates)
    stages, ends = [], []
    if warmup:
        start = TRI_STAGE_START * peak if optim.lr_scheduler_type == "tri_stage" else 0.0
        stages.append(optax.linear_schedule(start, peak, warmup))
        ends.append(warmup)
    if optim.hold_fraction:
        stages.append(optax.constant_schedule(peak))
        ends.append(warmup + int(optim.hold_fraction * updates))
    rest = max(1, updates - (ends[-1] if ends else 0))
    if optim.lr_scheduler_type == "linear":
        last = optax.linear_schedule(peak, 0.0, rest)
    elif optim.lr_scheduler_type == "cosine":
        last = optax.cosine_decay_schedule(peak, rest)
    elif optim.lr_scheduler_type == "tri_stage":
        last = optax.exponential_decay(peak, rest, TRI_STAGE_END, end_value=TRI_STAGE_END * peak)
    else:
        last = optax.constant_schedule(peak)
    return optax.join_schedules([*stages, last], ends)


def adamw(
    optim: config.OptimConfig, learning_rate: optax.Schedule, freeze_encoder_steps: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Clipping to a global norm, then AdamW; weights decay, biases and LayerNorm scales do not.

    With `head_learning_rate` the head's update is scaled by the ratio of the two rates, which is
    the same as another rate: an AdamW update, decay included, is proportional to its rate.

    In the first `freeze_encoder_steps` updates only the head is trained. The encoder's moments
    start after them, with their own count, so that their bias is corrected from there.

    Its `update` takes two keyword arguments: `norm`, the global norm of the whole gradients, as it
    may get slices of them, and `step`, the run's step including skipped updates.
    """
    adam = functools.partial(
        optax.adamw,
        b1=optim.adam_beta1,
        b2=optim.adam_beta2,
        eps=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
        mask=lambda params: {path: decays(path) for path in params},
    )
    if freeze_encoder_steps:
        late = optax.conditionally_mask(
            adam(1.0),
            lambda count, *, step, **others: step >= freeze_encoder_steps,
            forward_extra_args=True,
        )
        moves = optax.partition({True: adam(1.0), False: late}, in_head)
        # The schedule advances while the encoder is frozen.
        parts = [moves, optax.scale_by_schedule(learning_rate)]
    else:
        parts = [adam(learning_rate)]
    if optim.max_grad_norm is not None:
        parts.insert(0, _clip(optim.max_grad_norm))
    if optim.head_learning_rate is not None:
        ratio = optim.head_learning_rate / optim.learning_rate
        parts.append(optax.masked(optax.scale(ratio), in_head))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]


def in_head(params: Mapping[str, Any]) -> dict[str, bool]:
    """Which of these parameters belong to the CTC head."""
    return {path: path.startswith(HEAD) for path in params}


def _clip(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Like `optax.clip_by_global_norm`, with a norm that is given."""

    def update(gradients, state, params=None, *, norm, **others):
        del params, others
        return jax.tree.map(
            lambda g: jnp.where(norm < max_norm, g, (g / norm) * max_norm), gradients
        ), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def decays(path: str) -> bool:
    """Whether weight decay applies, by the rule of the Hugging Face Trainer."""
    return not path.endswith(("bias", "layer_norm/scale"))


def trainable(model: config.ModelConfig, model_config: Any) -> Callable[[str], bool]:
    """Which parameters get a gradient and an optimiser state.

    Args:
        model: with `freeze_feature_encoder` the convolutions get none; with `trainable_layers` = N
            only the head, the top N layers of the encoder, and the encoder's own LayerNorm if it
            comes after them.
        model_config: a transformers.Wav2Vec2Config. Without `do_stable_layer_norm` the encoder's
            LayerNorm comes before its layers.
    """
    if model.trainable_layers is None:
        return lambda path: (
            not (model.freeze_feature_encoder and path.startswith("wav2vec2/feature_extractor/"))
        )
    first = first_trained_layer(model, model_config.num_hidden_layers)
    norm_is_trained = model.trainable_layers > 0 and model_config.do_stable_layer_norm
    encoder = "wav2vec2/encoder/layers/"

    def is_trained(path: str) -> bool:
        if path.startswith(HEAD):
            return True
        if path.startswith(encoder):
            return int(path.removeprefix(encoder).split("/")[0]) >= first
        return norm_is_trained and path.startswith("wav2vec2/encoder/layer_norm/")

    return is_trained


def first_trained_layer(model: config.ModelConfig, layers: int) -> int:
    """The lowest encoder layer that is trained with `trainable_layers`; `layers` if none is."""
    return max(0, layers - model.trainable_layers)


@flax.struct.dataclass
class LossScale:
    """The factor for fp16 gradients that prevents underflow; 1 in other precisions.

    It doubles after `GROWTH_INTERVAL` finite updates and halves after a non-finite one, between
    `SMALLEST_LOSS_SCALE` and `LARGEST_LOSS_SCALE`; checked once an update.

    Source: torch.amp.GradScaler's rule and constants, with bounds.
    """

    value: Float[Array, ""]
    good_updates: Int[Array, ""]
    dynamic: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def create(cls, mixed_precision: str) -> "LossScale":
        """The scale of the first update: 65536 in fp16."""
        dynamic = mixed_precision == "fp16"
        return cls(jnp.float32(65536.0 if dynamic else 1.0), jnp.int32(0), dynamic)

    @property
    def is_smallest(self) -> Bool[Array, ""]:
        """Whether a non-finite update can no longer be helped by a smaller scale."""
        return self.value <= SMALLEST_LOSS_SCALE

    def after(self, finite: Bool[Array, ""]) -> "LossScale":
        """The scale of the next update."""
        if not self.dynamic:
            return self
        good = jnp.where(finite, self.good_updates + 1, 0)
        grow = good >= GROWTH_INTERVAL
        value = jnp.where(finite, jnp.where(grow, self.value * 2, self.value), self.value / 2)
        return self.replace(
            value=jnp.clip(value, SMALLEST_LOSS_SCALE, LARGEST_LOSS_SCALE),
            good_updates=jnp.where(grow, 0, good),
        )


def select(finite: Bool[Array, ""], new, old):
    """`new` if the update was finite, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
