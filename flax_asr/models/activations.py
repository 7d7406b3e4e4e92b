"""The activation functions that a Wav2Vec2Config may name, each equal to transformers' ACT2FN."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from flax_asr import errors

Activation = Callable[[jax.Array], jax.Array]


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x * Phi(x), with erf, which is cheaper than the erfc of jax.nn.gelu.

    In bfloat16 it uses one tanh instead, as erf takes a TPU some forty operations and its compiler
    a third of its time: before rounding, the value is within 3e-5 of the exact one, and the
    derivative within 1.1e-4.
    """
    if x.dtype == jnp.bfloat16:
        return _gelu_in_bfloat16(x)
    return x * (0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5))))


# Phi(x) = (1 + tanh(x * p(x^2))) / 2, with p fitted to minimise the largest errors of x * Phi(x)
# and its derivative for |x| <= 6. Beyond _LAST_SQUARE tanh is 1, and p would decrease again.
_PHI = (0.7974945, 0.0369931, -0.00034852)
_LAST_SQUARE = 30.0


@jax.custom_vjp
def _gelu_in_bfloat16(x):
    exact = x.astype(jnp.float32)
    return (exact * phi(exact)[0]).astype(x.dtype)


def _backward(x, gradient):
    # Without the barrier XLA reuses the tanh of the forward pass, which a GPU then has to keep in
    # float32: a quarter of a layer's memory. x is kept in any case, in two bytes.
    exact = jax.lax.optimization_barrier(x).astype(jnp.float32)
    probability, density = phi(exact)
    slope = probability + exact * density
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


_gelu_in_bfloat16.defvjp(lambda x: (_gelu_in_bfloat16(x), x), _backward)


def phi(x):
    """The normal distribution function and density, precise enough for GELU in bfloat16."""
    a, b, c = _PHI
    square = jnp.minimum(x * x, _LAST_SQUARE)
    tanh = jnp.tanh(x * (a + square * (b + square * c)))
    density = 0.5 * (1.0 - tanh * tanh) * (a + square * (3 * b + square * (5 * c)))
    return 0.5 + 0.5 * tanh, density


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU (Hendrycks and Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=True)


_BY_NAME: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_10": lambda x: jnp.clip(gelu(x), -10.0, 10.0),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "hardswish": jax.nn.hard_swish,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
NAMES = tuple(_BY_NAME)


def activation(name: str, key: str) -> Activation:
    """The function that the configuration calls `name` under `key`.

    Raises:
        ModelError: the name is unknown.
    """
    if name not in _BY_NAME:
        raise errors.ModelError(
            f"model configuration: {key}: {name!r} is not supported; it can be one of "
            f"{', '.join(NAMES)}"
        )
    return _BY_NAME[name]
