"""The feature encoder's first layer as a Pallas kernel for TPU: convolution, norm and GELU.

The layer makes many frames from few samples: XLA for TPU takes four times as long for the
convolution as for writing its output to memory. Here a program rotates the samples until those of
each frame come first in its row, and multiplies them with the taps; norm and GELU follow before the
frames leave the chip. Samples are read in their own order: rearranged by XLA they took more of the
compiler's time than any product of the model.

The output is [frames, batch, features] in memory, as XLA for TPU needs it for the next convolution.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from flax_asr.models import activations

LANES = 128
_SUBLANES = 8
_TAPS = 16
_ROWS = 2048
"""Frames that a program computes, over all clips: 2 MiB of bfloat16 with 512 features."""
_AT_ONCE = 4


def suits(batch: int, taps: int, features: int, stride: int) -> bool:
    """Whether the kernel can compute such a layer: frames of all clips must fill whole tiles."""
    whole = batch % _SUBLANES == 0 and LANES % batch == 0 and features % LANES == 0
    return whole and taps < _TAPS and (LANES // batch - 1) * stride + taps <= LANES


def frames(
    audio: Float[Array, "batch times"],
    kernel: Float[Array, "taps features"],
    bias: Float[Array, " features"],
    scale: Float[Array, " features"],
    shift: Float[Array, " features"],
    stride: int,
    epsilon: float,
    *,
    interpret: bool = False,
) -> Float[Array, "batch frames features"]:
    """gelu(scale * y / sqrt(mean(y^2) + epsilon) + shift) for every frame y of a convolution.

    Kernel and bias must have a mean of zero over the features, and then the frames have too. There
    is no gradient.

    Oracle: the same in XLA's operations, tests/models/test_first_layer.py.
    """
    batch, times = audio.shape
    taps, features = kernel.shape
    count = (times - taps) // stride + 1
    # The fewest frames whose samples begin and end at a lane tile, repeated as often as fits.
    fewest = LANES // math.gcd(stride, LANES)
    repeats = max(1, min(_ROWS // (fewest * batch), pl.cdiv(count, fewest)))
    parts = max(1, fewest * batch // _ROWS)
    samples = repeats * fewest * stride
    rows = repeats * fewest * batch // parts
    blocks = pl.cdiv(count * batch, rows)
    end = pl.cdiv(blocks, parts) * samples + LANES
    padded = jnp.pad(audio, ((0, 0), (0, max(0, end - times))))
    weights = jnp.zeros((_TAPS, features), audio.dtype)
    weights = weights.at[:taps].set(kernel.astype(audio.dtype))
    weights = weights.at[taps].set(bias.astype(audio.dtype))
    row = pl.BlockSpec((1, features), lambda block: (0, 0))
    made = pl.pallas_call(
        functools.partial(_kernel, epsilon, stride, taps, parts),
        grid=(blocks,),
        in_specs=[
            pl.BlockSpec((batch, samples), lambda block: (0, jax.lax.div(block, parts))),
            pl.BlockSpec(
                (batch, LANES),
                lambda block: (0, (jax.lax.div(block, parts) + 1) * (samples // LANES)),
            ),
            pl.BlockSpec((_TAPS, features), lambda block: (0, 0)),
            row,
            row,
        ],
        out_specs=pl.BlockSpec((rows, features), lambda block: (block, 0)),
        out_shape=jax.ShapeDtypeStruct((count * batch, features), audio.dtype),
        scratch_shapes=[
            pltpu.VMEM((batch, samples + LANES), jnp.float32),
            pltpu.VMEM((rows, LANES), audio.dtype),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            # The matrix unit always sums over all its 128 rows.
            flops=2 * count * batch * LANES * features,
            transcendentals=count * batch * features,
            bytes_accessed=count * batch * (stride + features) * audio.dtype.itemsize,
        ),
        interpret=interpret,
        name="first_layer",
    )(
        padded,
        padded,
        weights,
        scale.astype(jnp.float32)[None],
        shift.astype(jnp.float32)[None],
    )
    return made.reshape(count, batch, features).swapaxes(0, 1)


def _kernel(
    epsilon, stride, taps, parts, audio, following, weights, scale, shift, output, heard, under_taps
):
    """Frames of one of `parts` parts of `audio`; the last of them reach into `following`."""
    batch, samples = audio.shape
    steps = LANES // batch
    tiles = output.shape[0] // LANES
    first = jax.lax.rem(pl.program_id(0), parts) * tiles
    lanes = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
    heard[:, :samples] = audio[...].astype(jnp.float32)
    heard[:, samples:] = following[...].astype(jnp.float32)

    def rows_of(tile):
        return pl.ds(pl.multiple_of(tile * LANES, LANES), LANES)

    def samples_of(tile, _):
        start = (first + tile) * (steps * stride)
        lane = jax.lax.rem(start, LANES)
        # Rotate the samples from `start` on to the lanes from 0 on.
        turn = jax.lax.rem(LANES - lane, LANES)
        here, there = (
            pltpu.roll(heard[:, pl.ds(pl.multiple_of(at, LANES), LANES)], turn, 1)
            for at in (start - lane, start - lane + LANES)
        )
        window = jnp.where(lanes[:batch] < LANES - lane, here, there)
        turned = [pltpu.roll(window, (LANES - step * stride) % LANES, 1) for step in range(steps)]
        # A one for the bias; the lanes behind it have weights of zero.
        found = jnp.where(lanes == taps, 1.0, jnp.concatenate(turned))
        under_taps[rows_of(tile), :] = found.astype(under_taps.dtype)

    def frames_of(tile, _):
        found = jnp.dot(
            under_taps[rows_of(tile), :_TAPS], weights[...], preferred_element_type=jnp.float32
        )
        variance = jnp.square(found).mean(axis=1, keepdims=True)
        normed = found * jax.lax.rsqrt(variance + epsilon) * scale[...] + shift[...]
        made = normed * activations.phi(normed)[0]
        output[rows_of(tile), :] = made.astype(output.dtype)

    jax.lax.fori_loop(0, tiles, samples_of, None, unroll=math.gcd(_AT_ONCE, tiles))
    jax.lax.fori_loop(0, tiles, frames_of, None, unroll=math.gcd(_AT_ONCE, tiles))
