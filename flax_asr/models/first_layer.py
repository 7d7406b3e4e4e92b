"""The feature encoder's first layer as a Pallas kernel for TPU: convolution, norm and GELU.

It makes many frames from few samples: XLA for TPU takes four times as long for the convolution as
the memory takes for what it writes. Here a program makes frames by a product with the samples under
the taps, the last of which is 1, for the bias; norm and GELU follow before they leave the chip.

Frames stand as [frames, batch, features], as XLA for TPU wants them for the second convolution.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from flax_asr.models import activations

LANES = 128
_SUBLANES = 8
_TAPS = 16
"""Rows of samples in a product: whole tiles of bfloat16."""
_TILES = 16
"""Products of a program, of 128 frames each: 2 MiB of bfloat16 with 512 features."""
_AT_ONCE = 4


def suits(batch: int, taps: int, features: int) -> bool:
    """Whether the kernel takes such a layer: frames of all clips have to fill whole tiles."""
    return batch % _SUBLANES == 0 and LANES % batch == 0 and taps < _TAPS and features % LANES == 0


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
    """gelu(scale * y / sqrt(mean(y^2) + epsilon) + shift) of every frame y of a convolution.

    Kernel and bias have a mean of zero over the features, and so have the frames. Has no gradient.

    Oracle: the same in XLA's operations, tests/models/test_first_layer.py.
    """
    batch, times = audio.shape
    taps, features = kernel.shape
    count = (times - taps) // stride + 1
    samples = _under_taps(audio, taps, stride, count)
    weights = jnp.zeros((_TAPS, features), audio.dtype)
    weights = weights.at[:taps].set(kernel.astype(audio.dtype))
    weights = weights.at[taps].set(bias.astype(audio.dtype))
    block = min(_TILES, samples.shape[0])
    row = pl.BlockSpec((1, features), lambda t: (0, 0))
    made = pl.pallas_call(
        functools.partial(_kernel, epsilon),
        grid=(pl.cdiv(samples.shape[0], block),),
        in_specs=[
            pl.BlockSpec((block, _TAPS, LANES), lambda t: (t, 0, 0)),
            pl.BlockSpec((_TAPS, features), lambda t: (0, 0)),
            row,
            row,
        ],
        out_specs=pl.BlockSpec((block * LANES, features), lambda t: (t, 0)),
        out_shape=jax.ShapeDtypeStruct((count * batch, features), audio.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            # The matrix unit adds up over all its 128 rows, whatever stands in them.
            flops=2 * count * batch * LANES * features,
            transcendentals=count * batch * features,
            bytes_accessed=count * batch * (_TAPS + features) * audio.dtype.itemsize,
        ),
        interpret=interpret,
        name="first_layer",
    )(samples, weights, scale.astype(jnp.float32)[None], shift.astype(jnp.float32)[None])
    return made.reshape(count, batch, features).swapaxes(0, 1)


def _under_taps(audio, taps, stride, count) -> Float[Array, "tiles rows lanes"]:
    """The samples under each tap, a row a tap, and then 1 and zeros; a lane a frame of a clip.

    By products with zeros and ones: a TPU turns lanes around slowly in any other way.
    """
    batch, times = audio.shape
    steps = LANES // batch
    tiles = pl.cdiv(count, steps)
    turns = pl.cdiv(taps, stride)
    padded = jnp.pad(audio, ((0, 0), (0, max(0, (tiles * steps + turns) * stride - times))))
    clip, step, phase = np.meshgrid(*map(np.arange, (batch, steps, stride)), indexing="ij")
    places = np.zeros((batch, steps * stride, stride, LANES), np.float32)
    places[clip, step * stride + phase, phase, step * batch + clip] = 1.0
    places = jnp.asarray(places.reshape(batch, steps * stride, -1), audio.dtype)
    rows = []
    for turn in range(turns):
        here = padded[:, turn * stride :][:, : tiles * steps * stride]
        chosen = jax.lax.dot_general(
            here.reshape(batch, tiles, -1),
            places,
            (((0, 2), (0, 1)), ((), ())),
            preferred_element_type=audio.dtype,
        ).reshape(tiles, stride, LANES)
        rows.append(chosen[:, : min(stride, taps - turn * stride)].swapaxes(0, 1))
    rows.append(jnp.ones((1, tiles, LANES), audio.dtype))
    rows.append(jnp.zeros((_TAPS - taps - 1, tiles, LANES), audio.dtype))
    # Row by row: XLA for TPU would first copy every array to an order in which rows come last.
    return jax.lax.optimization_barrier(jnp.concatenate(rows)).swapaxes(0, 1)


def _kernel(epsilon, samples, weights, scale, shift, output):
    tiles = samples.shape[0]

    def frames_of(tile, _):
        found = jax.lax.dot_general(
            samples[tile],
            weights[...],
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        variance = jnp.square(found).mean(axis=1, keepdims=True)
        normed = found * jax.lax.rsqrt(variance + epsilon) * scale[...] + shift[...]
        made = normed * activations.phi(normed)[0]
        start = pl.multiple_of(tile * LANES, LANES)
        output[pl.ds(start, LANES), :] = made.astype(output.dtype)

    jax.lax.fori_loop(0, tiles, frames_of, None, unroll=math.gcd(_AT_ONCE, tiles))
