"""Layerdrop: layers that are skipped at random while training.

Source: Fan et al. 2020, "Reducing transformer depth on demand with structured dropout".
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def apply(
    layer_class: type[nn.Module],
    made: Callable[[type[nn.Module]], nn.Module],
    kept: Bool[Array, ""],
    x: Float[Array, "batch frames hidden"],
    frame_mask: Bool[Array, "batch frames"] | None,
    *,
    heads: int,
    keep_attentions: bool,
    platform: str,
) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch heads frames frames"] | None]:
    """The layer's output and attention weights if it is kept, else `x` and zeros.

    A skipped layer has gradients of zero, even if something overflows in it.

    Args:
        layer_class: a module that maps (x, frame_mask) to (output, attention weights).
        made: makes the layer, of that class or of a wrapper of it.
        kept: whether the layer is kept this time.
        x: the layer's input.
        frame_mask: true for real frames.
        heads: number of attention heads.
        keep_attentions: whether the weights are wanted; else they are None.
        platform: on "tpu" the layer is always computed and its output selected. A branch would
            save the work, but XLA fuses nothing across it, and fills what the backward pass may
            need with zeros, which takes longer than the layer. Elsewhere it is a branch.
    """
    if platform == "tpu":
        y, weights = made(_layer_with_gradient_if(kept, layer_class))(
            _with_gradient_if(kept, x), frame_mask
        )
        return jnp.where(kept, y, x), jnp.where(kept, weights, 0) if keep_attentions else None

    def run(layer: nn.Module, x: Array) -> tuple[Array, ...]:
        y, weights = layer(x, frame_mask)
        return (y, weights) if keep_attentions else (y,)

    def skip(layer: nn.Module, x: Array) -> tuple[Array, ...]:
        shape = (x.shape[0], heads, x.shape[1], x.shape[1])
        return (x, jnp.zeros(shape, x.dtype)) if keep_attentions else (x,)

    y, *weights = nn.cond(kept, run, skip, made(layer_class), x)
    return y, weights[0] if keep_attentions else None


def _layer_with_gradient_if(kept: Bool[Array, ""], layer_class: type[nn.Module]) -> type[nn.Module]:
    """The layer class, whose parameters get a gradient of zero if the layer is not kept."""

    def parameters(tree):
        return jax.tree.map(lambda leaf: _with_gradient_if(kept, leaf), tree)

    return nn.map_variables(layer_class, "params", parameters)


@jax.custom_vjp
def _with_gradient_if(kept, x):
    """`x`, whose gradient is zero if not kept: selected, as 0 times infinity is NaN."""
    return x


# lax.select, as XLA would merge a jnp.where with the optimiser's, and `plan` count it in the wrong
# part.
_with_gradient_if.defvjp(
    lambda kept, x: (x, kept),
    lambda kept, gradient: (None, jax.lax.select(kept, gradient, jnp.zeros_like(gradient))),
)
