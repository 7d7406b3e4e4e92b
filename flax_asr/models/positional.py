"""The convolutional position embedding: weight norm, and a grouped convolution for each platform.

On a CPU, XLA's own gradient of this convolution (128 taps, 16 groups) is ten times slower than
PyTorch's. There the convolution is computed in blocks in the frequency domain, where the transforms
and the products at each frequency are matrix products, which XLA does well. Elsewhere XLA's
convolution is used, on TPU with the weight in the layout of its faster form. All compute the same
function. The choice is made when the program is lowered, so a program compiled for another platform
gets that platform's form.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import layout
from jaxtyping import Array, Float

from flax_asr.models import activations, layers


def weight_norm(
    g: Float[Array, "1 1 taps"], v: Float[Array, "out inputs taps"]
) -> Float[Array, "out inputs taps"]:
    """The weight with direction `v` and, tap by tap, norm `g`.

    Source: torch.nn.utils.parametrizations.weight_norm with dim=2.
    """
    return v * (g * jax.lax.rsqrt(jnp.sum(jnp.square(v), axis=(0, 1), keepdims=True)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def grouped_convolution(
    x: Float[Array, "batch frames hidden"],
    weight: Float[Array, "hidden inputs taps"],
    groups: int,
) -> Float[Array, "batch frames hidden"]:
    """Cross-correlation over time within groups of channels; as many frames out as in.

    Frame t sees frames t - taps // 2 up to t - taps // 2 + taps - 1, zeros outside: PyTorch's
    padding of taps // 2 on both sides, with the surplus last frame of an even kernel dropped.
    """
    return jax.lax.platform_dependent(
        x,
        weight,
        cpu=functools.partial(_spectral, groups=groups),
        tpu=functools.partial(_by_tap, groups=groups),
        default=functools.partial(direct_convolution, groups=groups),
    )


def _forward(x, weight, groups):
    return grouped_convolution(x, weight, groups), (x, weight)


def _backward(groups, residuals, gradient):
    def direct(x, weight, gradient):
        _, pull_back = jax.vjp(functools.partial(direct_convolution, groups=groups), x, weight)
        return pull_back(gradient)

    return jax.lax.platform_dependent(
        *residuals,
        gradient,
        cpu=functools.partial(_spectral_gradient, groups=groups),
        tpu=functools.partial(_by_tap_gradient, groups=groups),
        default=direct,
    )


grouped_convolution.defvjp(_forward, _backward)


def direct_convolution(
    x: Float[Array, "batch frames hidden"],
    weight: Float[Array, "hidden inputs taps"],
    groups: int,
) -> Float[Array, "batch frames hidden"]:
    """`grouped_convolution` by XLA's own operation."""
    taps = weight.shape[-1]
    return jax.lax.conv_general_dilated(
        x,
        weight,
        window_strides=(1,),
        padding=[(taps // 2, (taps - 1) // 2)],
        dimension_numbers=("NTC", "OIT", "NTC"),
        feature_group_count=groups,
        precision=layers.precision(x.dtype),
    )


# The form for TPU. The convolution takes less than half the time if the weight lies in memory as
# [tap, group, input, output], the order that XLA uses; from any other order it is copied. Without
# the barriers XLA moves the transposition into the convolution and the weight stays as it was.
# Without those around x and weight, XLA transposes the weight for both passes at the start of the
# program, long before x exists, and stores it until then.


def _by_tap(x, weight, groups):
    taps = weight.shape[-1]
    x, weight = jax.lax.optimization_barrier((x, weight))
    return _tap_first(x, _first_taps(weight, groups), before=taps // 2)


def _by_tap_gradient(x, weight, gradient, groups):
    hidden, width, taps = weight.shape
    gradient, x, weight = jax.lax.optimization_barrier((gradient, x, weight))
    flipped = weight[..., ::-1].reshape(groups, -1, width, taps).transpose(3, 0, 1, 2)
    flipped = jax.lax.optimization_barrier(flipped)
    x_gradient = _tap_first(gradient, flipped, before=(taps - 1) // 2)
    own = functools.partial(_tap_first, x, before=taps // 2)
    like = jax.eval_shape(functools.partial(_first_taps, groups=groups), weight)
    (weight_gradient,) = jax.linear_transpose(own, like)(gradient)
    weight_gradient = weight_gradient.transpose(1, 3, 2, 0).reshape(hidden, width, taps)
    # Otherwise XLA transposes weight and moments to the gradient's order, and back.
    rows_first = layout.Layout(major_to_minor=(0, 1, 2))
    return x_gradient, layout.with_layout_constraint(weight_gradient, rows_first)


def _first_taps(weight, groups):
    hidden, width, taps = weight.shape
    weight = weight.reshape(groups, hidden // groups, width, taps).transpose(3, 0, 2, 1)
    return jax.lax.optimization_barrier(weight)


def _tap_first(x, weight, before):
    taps, groups, inputs, outputs = weight.shape
    return jax.lax.conv_general_dilated(
        x,
        weight.transpose(0, 2, 1, 3).reshape(taps, inputs, groups * outputs),
        window_strides=(1,),
        padding=[(before, taps - 1 - before)],
        dimension_numbers=("NTC", "TIO", "NTC"),
        feature_group_count=groups,
        precision=layers.precision(x.dtype),
    )


# The spectral form. A row is cut into blocks of taps + 1 output frames, each of which depends on
# 2 * taps input frames: overlap-save with a transform of 2 * taps points. A real signal's transform
# is kept as its cosine and sine parts (the real part and minus the imaginary one), stacked on an
# axis `z`; products of two transforms are written out in these parts. Operands are in the order in
# which XLA returns a product's axes: any other order adds a copy of the weight or its gradient.


@functools.cache
def _transform(taps: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrices [2, taps + 1 frequencies, 2 * taps points]: to the frequencies, and back."""
    points, frequencies = 2 * taps, taps + 1
    turns = np.arange(frequencies)[:, None] * np.arange(points)[None, :] % points / points
    there = np.stack([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)])
    multiplicity = np.full((frequencies, 1), 2.0)
    multiplicity[[0, -1]] = 1.0
    back = there * multiplicity / points
    return there.astype(np.float32), back.astype(np.float32)


_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _spectra(x, weight, groups):
    """Transforms of the input blocks [f g z rows i] and, part by part, of the weight [f g o i]."""
    batch, frames, hidden = x.shape
    taps = weight.shape[-1]
    there, _ = _transform(taps)
    step = taps + 1
    blocks = -(-frames // step)
    after = blocks * step + taps - 1 - taps // 2 - frames
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (taps // 2, after), (0, 0)))
    cut = [padded[:, step * block : step * block + 2 * taps] for block in range(blocks)]
    rows = jnp.stack(cut, axis=1).reshape(batch * blocks, 2 * taps, groups, hidden // groups)
    weight = weight.astype(jnp.float32).reshape(groups, hidden // groups, hidden // groups, taps)
    return (
        _einsum("zfn,rngi->fgzri", there, rows),
        [_einsum("fk,goik->fgoi", part[:, :taps], weight) for part in there],
    )


def _spectral(x, weight, groups):
    batch, frames, hidden = x.shape
    taps = weight.shape[-1]
    _, back = _transform(taps)
    rows, (cosine, sine) = _spectra(x, weight, groups)
    by_cosine = _einsum("fgzri,fgoi->fgzro", rows, cosine)
    by_sine = _einsum("fgzri,fgoi->fgzro", rows, sine)
    product = jnp.stack(
        [by_cosine[:, :, 0] + by_sine[:, :, 1], by_cosine[:, :, 1] - by_sine[:, :, 0]]
    )
    y = _einsum("zfgro,zft->rtgo", product, back[:, :, : taps + 1])
    return y.reshape(batch, -1, hidden)[:, :frames].astype(x.dtype)


def _spectral_gradient(x, weight, gradient, groups):
    batch, frames, hidden = x.shape
    taps = weight.shape[-1]
    there, back = _transform(taps)
    step = taps + 1
    blocks = -(-frames // step)
    rows, (cosine, sine) = _spectra(x, weight, groups)

    outputs = jnp.pad(
        gradient.astype(jnp.float32), ((0, 0), (0, blocks * step - frames), (0, 0))
    ).reshape(batch * blocks, step, groups, hidden // groups)
    outputs = _einsum("zft,rtgo->fgzro", there[:, :, :step], outputs)

    by_cosine = _einsum("fgzro,fgoi->fgzri", outputs, cosine)
    by_sine = _einsum("fgzro,fgoi->fgzri", outputs, sine)
    product = jnp.stack(
        [by_cosine[:, :, 0] - by_sine[:, :, 1], by_cosine[:, :, 1] + by_sine[:, :, 0]]
    )
    cut = _einsum("zfgri,zfn->rngi", product, back).reshape(batch, blocks, 2 * taps, hidden)
    x_gradient = sum(
        jnp.pad(cut[:, block], ((0, 0), (block * step, (blocks - 1 - block) * step), (0, 0)))
        for block in range(blocks)
    )[:, taps // 2 : taps // 2 + frames]

    rotated = jnp.stack([rows[:, :, 1], -rows[:, :, 0]], axis=2)
    product = jnp.stack(
        [
            _einsum("fgzro,fgzri->fgoi", outputs, rows),
            _einsum("fgzro,fgzri->fgoi", outputs, rotated),
        ]
    )
    weight_gradient = _einsum("zfk,zfgoi->kgoi", back[:, :, :taps], product)
    weight_gradient = jnp.moveaxis(weight_gradient, 0, -1)
    return (
        x_gradient.astype(x.dtype),
        weight_gradient.reshape(weight.shape).astype(weight.dtype),
    )


class _WeightNormConv(nn.Module):
    """The parameters of the convolution, under the names they have in a checkpoint."""

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch frames hidden"]) -> Array:
        hidden, taps = self.config.hidden_size, self.config.num_conv_pos_embeddings
        groups = self.config.num_conv_pos_embedding_groups
        deviation = 2.0 * (taps * hidden) ** -0.5
        v = self.param(
            "weight_v", nn.initializers.normal(deviation), (hidden, hidden // groups, taps)
        )
        g = self.param("weight_g", lambda _: jnp.linalg.norm(v, axis=(0, 1))[None, None, :])
        bias = self.param("bias", nn.initializers.zeros, (hidden,))
        weight = weight_norm(g, v).astype(self.dtype)
        y = grouped_convolution(x.astype(self.dtype), weight, groups)
        return y + bias.astype(self.dtype)


class PositionalConvEmbedding(nn.Module):
    """The position embedding, which is added to the projected features."""

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch frames hidden"]) -> Array:
        name = self.config.feat_extract_activation
        activate = activations.activation(name, "feat_extract_activation")
        return activate(_WeightNormConv(self.config, self.dtype, name="conv")(x))
