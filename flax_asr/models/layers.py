"""What every part of the model is built from: dense, layer norm, dropout, rematerialisation.

One convention each, kept here: parameters are float32 and are cast where they are used; matrix
products run in the compute dtype, and at full precision when that is float32, whatever the
backend's default; means and variances are float32.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_asr import errors

# A transformers.Wav2Vec2Config. Not imported for its name: transformers imports torch where it can.
Wav2Vec2Config = Any
Dtype = Any

REMAT_POLICIES = (
    "none",
    "full",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
)


def precision(dtype: Dtype) -> jax.lax.Precision | None:
    """HIGHEST for float32, so that it never means bfloat16 passes (TPU) or TF32 (GPU)."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def dense(config: Wav2Vec2Config, features: int, dtype: Dtype, name: str) -> nn.Dense:
    """A linear layer, initialised as transformers does: normal weights, zero bias."""
    return nn.Dense(
        features,
        dtype=dtype,
        precision=precision(dtype),
        kernel_init=nn.initializers.normal(config.initializer_range),
        name=name,
    )


def layer_norm(dtype: Dtype, name: str, epsilon: float = 1e-5) -> nn.LayerNorm:
    """LayerNorm over the last axis, statistics in float32, variance around the mean."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def uniform(bound: float) -> nn.initializers.Initializer:
    """Initialiser: uniform in [-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dropout(nn.Module):
    """Zeroes elements with probability `rate` and scales the rest; nothing at all when it is off.

    Sixteen random bits decide an element (half of the generator's work), so `rate` is rounded to a
    multiple of 2**-16; the scale is that of the rounded rate, so the expectation is exact.
    """

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        levels = 1 << 16
        kept_levels = round((1.0 - self.rate) * levels)
        if self.deterministic or kept_levels >= levels:
            return x
        if kept_levels <= 0:
            return jnp.zeros_like(x)
        bits = jax.random.bits(self.make_rng("dropout"), x.shape, jnp.uint16)
        scale = jnp.asarray(levels / kept_levels, x.dtype)
        return jnp.where(bits < kept_levels, x * scale, jnp.zeros_like(x))


def rematerialised(module: type[nn.Module], policy: str) -> type[nn.Module]:
    """The module class, recomputed in the backward pass as `policy` says.

    Args:
        module: the class to wrap.
        policy: one of REMAT_POLICIES: "none" keeps every intermediate result, "full" only the
            inputs, the others are jax.checkpoint_policies of that name.

    Raises:
        ModelError: the policy is unknown.
    """
    if policy not in REMAT_POLICIES:
        raise errors.ModelError(
            f"model.remat_policy: {policy!r} is not one of {', '.join(REMAT_POLICIES)}"
        )
    if policy == "none":
        return module
    if policy == "full":
        return nn.remat(module)
    return nn.remat(module, policy=getattr(jax.checkpoint_policies, policy))
