"""AdamW, its schedules, and which parameters are trained.

Everything numeric is optax's; what is here is the choice and the composition. Parameters are flat
dictionaries by their path, `wav2vec2/encoder/layers/0/attention/q_proj/kernel`.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from flax_asr import config

LARGEST_LOSS_SCALE = 2.0**24
SMALLEST_LOSS_SCALE = 1.0
GROWTH_INTERVAL = 2000


def schedule(optim: config.OptimConfig, updates: int) -> optax.Schedule:
    """The learning rate of every update, counted from 0.

    A linear rise from 0 over `warmup_steps`, then `linear` falls to 0 at `updates`, `cosine` falls
    there along half a cosine, `constant` stays.

    Source: transformers' get_linear_schedule_with_warmup and its siblings; oracle: those.
    """
    peak = optim.learning_rate
    rest = max(1, updates - optim.warmup_steps)
    if optim.lr_scheduler_type == "linear":
        after = optax.linear_schedule(peak, 0.0, rest)
    elif optim.lr_scheduler_type == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    else:
        after = optax.constant_schedule(peak)
    if optim.warmup_steps == 0:
        return after
    rise = optax.linear_schedule(0.0, peak, optim.warmup_steps)
    return optax.join_schedules([rise, after], [optim.warmup_steps])


def adamw(
    optim: config.OptimConfig, learning_rate: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Clipping to a global norm, then AdamW; weights decay, biases and LayerNorm scales do not."""
    optimiser = optax.adamw(
        learning_rate,
        b1=optim.adam_beta1,
        b2=optim.adam_beta2,
        eps=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
        mask=lambda params: {path: decays(path) for path in params},
    )
    if optim.max_grad_norm is None:
        return optimiser
    return optax.chain(optax.clip_by_global_norm(optim.max_grad_norm), optimiser)


def decays(path: str) -> bool:
    """Whether weight decay applies, by the rule of the Hugging Face Trainer."""
    return not path.endswith(("bias", "layer_norm/scale"))


def trainable(model: config.ModelConfig, layers: int) -> Callable[[str], bool]:
    """Which parameters get a gradient and an optimiser state.

    Args:
        model: `freeze_feature_encoder` stops at the convolutions, `trainable_layers` = N leaves
            only the head, the top N of the encoder's layers and its last LayerNorm.
        layers: the number of the encoder's layers.
    """
    if model.trainable_layers is None:
        return lambda path: (
            not (model.freeze_feature_encoder and path.startswith("wav2vec2/feature_extractor/"))
        )
    first = layers - model.trainable_layers
    encoder = "wav2vec2/encoder/layers/"

    def is_trained(path: str) -> bool:
        if path.startswith("lm_head/"):
            return True
        if path.startswith(encoder):
            return int(path.removeprefix(encoder).split("/")[0]) >= first
        return path.startswith("wav2vec2/encoder/layer_norm/") and model.trainable_layers > 0

    return is_trained


@flax.struct.dataclass
class LossScale:
    """What fp16 gradients are multiplied by so that they do not underflow; 1 in other precisions.

    It doubles after `GROWTH_INTERVAL` finite updates and halves after one that is not, between
    `SMALLEST_LOSS_SCALE` and `LARGEST_LOSS_SCALE`; judged once an update.

    Source: torch.amp.GradScaler's rule and constants, with bounds.
    """

    value: Float[Array, ""]
    good_updates: Int[Array, ""]
    dynamic: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def create(cls, mixed_precision: str) -> "LossScale":
        dynamic = mixed_precision == "fp16"
        return cls(jnp.float32(65536.0 if dynamic else 1.0), jnp.int32(0), dynamic)

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
    """`new` where the update was finite, `old` where it was not, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
