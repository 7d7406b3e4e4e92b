"""Building blocks of the model: dense layers, layer norm, dropout, rematerialisation.

The conventions: parameters are float32 and are cast where they are used; matrix products run in
the compute dtype, at full precision if that is float32, whatever the backend's default; means and
variances are float32.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_asr import errors

# A transformers.Wav2Vec2Config; not imported, as transformers imports torch if it is installed.
Wav2Vec2Config = Any
Dtype = Any

REMAT_POLICIES = (
    "none",
    "full",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
)


def precision(dtype: Dtype) -> jax.lax.Precision | None:
    """HIGHEST for float32, so that it is never computed in bfloat16 passes (TPU) or TF32 (GPU)."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def default_platform() -> str:
    """The platform of JAX's default device: "tpu", "gpu" or "cpu"."""
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def dense(
    config: Wav2Vec2Config, features: int, dtype: Dtype, name: str
) -> Callable[[jax.Array], jax.Array]:
    """A linear layer, initialised as transformers does: normal weights, zero bias."""
    project = Projection(config, features, dtype, name=name)

    def apply(x: jax.Array) -> jax.Array:
        product, bias = project(x)
        with jax.named_scope(name):
            return plus_bias(product, bias)

    return apply


def plus_bias(product: jax.Array, bias: jax.Array) -> jax.Array:
    """Their sum in the product's dtype.

    The bias is not rounded first on TPU, where that would take a separate pass.
    """
    return jax.lax.platform_dependent(product, bias, tpu=_exact_sum, default=_rounded_sum)


def _rounded_sum(product, bias):
    return product + bias.astype(product.dtype)


def _exact_sum(product, bias):
    return (product.astype(bias.dtype) + bias).astype(product.dtype)


class Projection(nn.Module):
    """Like `dense`, but returns (product, bias) and leaves their sum to the caller."""

    config: Wav2Vec2Config
    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        init = nn.initializers.normal(self.config.initializer_range)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        product = jnp.matmul(
            x.astype(self.dtype), kernel.astype(self.dtype), precision=precision(self.dtype)
        )
        return product, bias


def layer_norm(dtype: Dtype, name: str, epsilon: float) -> nn.LayerNorm:
    """LayerNorm over the last axis, statistics in float32.

    In float32 the variance is computed around the mean. In half precision it is the mean of squares
    minus the square of the mean: half the passes over memory, and a rounding error far below that
    of the input.
    """
    exact = jnp.dtype(dtype) == jnp.float32
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=not exact, name=name)


def norm_beside(dtype: Dtype, name: str, epsilon: float) -> Callable[[jax.Array], Any]:
    """LayerNorm as `layer_norm`, for the start of a residual branch: x -> (normed, x).

    Use the returned x for the residual: the gradients of both outputs are then added in one place,
    which in bfloat16 saves two passes over the frames compared with JAX's own gradients.
    """
    if jnp.dtype(dtype) == jnp.bfloat16:
        return _NormBeside(epsilon, dtype, name=name)
    norm = layer_norm(dtype, name, epsilon)
    return lambda x: (norm(x), x)


class _NormBeside(nn.Module):
    epsilon: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return _normed_beside(x, scale, bias, self.epsilon, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normed_beside(x, scale, bias, epsilon, dtype):
    return _forward(x, scale, bias, epsilon, dtype)[0]


def _forward(x, scale, bias, epsilon, dtype):
    exact = x.astype(jnp.float32)
    mean = exact.mean(axis=-1, keepdims=True)
    variance = jnp.square(exact).mean(axis=-1, keepdims=True) - jnp.square(mean)
    inverse = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + epsilon)
    normed = (exact - mean) * (inverse * scale) + bias
    return (normed.astype(dtype), x), (x, mean, inverse, scale)


def _backward(epsilon, dtype, residuals, gradients):
    x, mean, inverse, scale = residuals
    gradient, beside = (g.astype(jnp.float32) for g in gradients)
    standard = (x.astype(jnp.float32) - mean) * inverse
    scaled = gradient * scale
    # The terms without a sum over the frame are added first, fused with the product before them;
    # the barrier keeps XLA from reading them again after the sums.
    direct = (beside + scaled * inverse).astype(x.dtype)
    shift = scaled.mean(axis=-1, keepdims=True) * inverse
    slope = (scaled * standard).mean(axis=-1, keepdims=True) * jnp.square(inverse)
    direct = jax.lax.optimization_barrier(direct).astype(jnp.float32)
    x_gradient = direct - (shift - mean * slope) - x.astype(jnp.float32) * slope
    rows = tuple(range(x.ndim - 1))
    return x_gradient.astype(x.dtype), (gradient * standard).sum(rows), gradient.sum(rows)


_normed_beside.defvjp(_forward, _backward)


def uniform(bound: float) -> nn.initializers.Initializer:
    """Initialiser: uniform in [-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dropout(nn.Module):
    """Zeroes elements with probability `rate` and scales the rest; the identity if it is off.

    Whether an element is kept is a hash of its index and of two words drawn from the key: a few
    integer operations, fused into the product that they mask. No mask is stored between forward
    and backward pass, and JAX's generator, which took two fifths of a small model's update on a
    CPU, is not needed for each element.
    """

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.is_on:
            return x
        return dropped(x, self.words(), self.rate)

    @property
    def is_on(self) -> bool:
        """Whether anything is dropped."""
        return not self.deterministic and _dropped_levels(self.rate) > 0

    def words(self) -> jax.Array:
        """The two key words of a call: uint32 [2]."""
        return jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dropped(x: jax.Array, words: jax.Array, rate: float) -> jax.Array:
    """`x` after dropout at this rate; `words` are the two key words of the call, uint32 [2]."""
    is_kept = kept(flat_places(x.shape), words, rate)
    return jnp.where(is_kept, x * jnp.asarray(kept_scale(rate), x.dtype), jnp.zeros_like(x))


def _dropped_forward(x, words, rate):
    return dropped(x, words, rate), words


def _dropped_backward(rate, words, gradient):
    # The barrier hides from XLA that the mask is that of the forward pass, which it would keep.
    return dropped(gradient, jax.lax.optimization_barrier(words), rate), None


dropped.defvjp(_dropped_forward, _dropped_backward)

_LEVELS = 2**32  # of the hash of an index; the lowest `rate` of them are dropped


def _dropped_levels(rate: float) -> int:
    return round(rate * _LEVELS)


def kept(places: jax.Array, words: Iterable[jax.Array], rate: float) -> jax.Array:
    """Which elements dropout keeps, from their indices and the key words of a call."""
    if _dropped_levels(rate) >= _LEVELS:
        return jnp.zeros(places.shape, bool)
    return hashed(places, words) >= jnp.uint32(_dropped_levels(rate))


def kept_scale(rate: float) -> float:
    """What the elements that dropout keeps are multiplied by."""
    return _LEVELS / max(_LEVELS - _dropped_levels(rate), 1)


def flat_places(shape: tuple[int, ...]) -> jax.Array:
    """The flat index of each element of an array, in C order, modulo 2**32: uint32 [shape]."""
    places = jnp.zeros(shape, jnp.uint32)
    step = 1
    for axis in reversed(range(len(shape))):
        places += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(step % _LEVELS)
        step *= shape[axis]
    return places


def hashed(places: jax.Array, words: Iterable[jax.Array]) -> jax.Array:
    """32 well-mixed bits for each index, from key words.

    Source: two rounds of the finaliser of MurmurHash3 (A. Appleby, public domain), with a key word
    before each; every input bit changes every output bit with probability one half.
    """
    for word in words:
        places ^= word
        places = (places ^ (places >> 16)) * jnp.uint32(0x85EBCA6B)
        places = (places ^ (places >> 13)) * jnp.uint32(0xC2B2AE35)
        places ^= places >> 16
    return places


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
