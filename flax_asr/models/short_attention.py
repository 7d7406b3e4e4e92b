"""Attention over the frames of short clips as a Pallas kernel for TPU.

XLA writes the scores of every head to memory and reads them back several times: at ten seconds a
clip that takes five times as long as the matrix products of a layer. Here a program holds the
scores of one clip, a few heads and a block of queries on the chip. Queries, keys, values, output
and their gradients are all that crosses memory; the backward pass computes the scores once more.

Arrays stay [batch, frames, hidden], as the projections around leave them. A block is the fewest
whole heads that fill whole lanes (two heads of 64 channels, eight of 80), or all channels. A head
is not cut out of its lanes: its neighbours are set to zero in one factor of each product, which
costs nothing, as the matrix unit is as wide as the lanes.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from flax_asr.models import layers

LANES = 128
_SUBLANES = 8
QUERIES = 512
"""Queries that a program takes at once: scores of 512 x 1024 frames are 2 MiB in float32."""
LONGEST_FRAMES = 2048
"""Beyond, scores take too much of the memory on the chip; 41 seconds of audio."""

_HIDDEN_SCORE = -1e30  # of a padding frame; finite, so that a clip without frames gives no NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(
    products: tuple[Float[Array, "batch frames hidden"], ...],
    biases: tuple[Float[Array, " hidden"], ...],
    lengths: Int[Array, " batch"],
    heads: int,
) -> Float[Array, "batch frames hidden"]:
    """softmax(query key^T / sqrt(channels)) value, over the first `lengths` frames of each clip.

    Products are in the arrays' dtype with float32 sums, the softmax is float32; a clip without a
    frame attends to all alike. Runs on TPU, and interpreted on CPU.

    Args:
        products: of the weights that make query, key and value, before their biases are added:
            the kernel sums up the biases' gradients while it has them at hand.
        biases: of query, key and value.
        lengths: real frames of each clip.
        heads: into how many the hidden channels are divided.

    Oracles: the plain form in attention.py and PyTorch, tests/models/test_attention.py.
    """
    return _forward(products, biases, lengths, heads)[0]


def _forward(products, biases, lengths, heads):
    dtype, head_size = products[0].dtype, products[0].shape[-1] // heads
    query, key, value = (x + b.astype(dtype) for x, b in zip(products, biases, strict=True))
    query = query * jnp.asarray(head_size**-0.5, dtype)
    (mixed,) = _call(_forward_kernel, heads, lengths, query, key, value)
    return mixed, (query, key, value, lengths, biases)


def _backward(heads, residuals, gradient):
    query, key, value, lengths, biases = residuals
    *gradients, sums = _call(_backward_kernel, heads, lengths, query, key, value, gradient)
    sums = sums.sum(axis=0)
    bias_gradients = tuple(sums[i].astype(bias.dtype) for i, bias in enumerate(biases))
    return tuple(gradients), bias_gradients, None


attend.defvjp(_forward, _backward)


def _call(kernel, heads, lengths, *arrays):
    """Runs a kernel over (clips, blocks of heads, blocks of queries).

    Query, output and their gradients are cut by query, the others are whole.
    """
    batch, frames, hidden = arrays[0].shape
    head_size = hidden // heads
    width = math.lcm(head_size, LANES)
    if hidden % width:
        width = hidden
    queries = min(frames, QUERIES)
    whole_lanes = pl.cdiv(frames, LANES) * LANES
    by_query = pl.BlockSpec((1, queries, width), lambda b, h, q, lengths: (b, q, h))
    whole = pl.BlockSpec((1, frames, width), lambda b, h, q, lengths: (b, 0, h))
    like = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
    if kernel is _forward_kernel:
        products, in_specs, out_specs = 2, [by_query, whole, whole], [by_query]
        results, scratch = [like], []
    else:
        sums = pl.BlockSpec((1, 3, width), lambda b, h, q, lengths: (b, 0, h))
        products, in_specs = 5, [by_query, whole, whole, by_query]
        out_specs = [by_query, whole, whole, sums]
        results = [like, like, like, jax.ShapeDtypeStruct((batch, 3, hidden), jnp.float32)]
        scratch = [pltpu.VMEM((rows, width), jnp.float32) for rows in (_SUBLANES, frames, frames)]

    def run(*operands, interpret):
        return pl.pallas_call(
            functools.partial(kernel, head_size),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(batch, hidden // width, pl.cdiv(frames, queries)),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=results,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=_vmem_bytes(frames, queries, width, like.dtype.itemsize),
            ),
            cost_estimate=pl.CostEstimate(
                # The matrix unit takes whole lanes of one of the two.
                flops=products * 2 * batch * frames * whole_lanes * hidden,
                transcendentals=batch * heads * frames * frames,
                bytes_accessed=(len(arrays) + len(out_specs)) * arrays[0].nbytes,
            ),
            interpret=interpret,
            name=kernel.__name__.strip("_"),
        )(*operands)

    return jax.lax.platform_dependent(
        lengths.astype(jnp.int32),
        *arrays,
        cpu=functools.partial(run, interpret=True),
        default=functools.partial(run, interpret=False),
    )


def _vmem_bytes(frames, queries, width, itemsize):
    """Blocks twice, as the next ones arrive meanwhile; sums; five score matrices of a head."""
    blocks = (3 * queries + 4 * frames) * width * itemsize * 2
    return 4 * 2**20 + blocks + 2 * frames * width * 4 + 5 * queries * frames * 4


class _Head(NamedTuple):
    """Where a head's channels lie in a block: the lane tiles around them, and which lanes."""

    window: slice
    first: int
    last: int

    def only(self, x):
        """The window of `x`, with zeros in other heads' channels."""
        x = x[:, self.window]
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + self.window.start
        return jnp.where((lane >= self.first) & (lane < self.last), x, jnp.zeros_like(x))


def _heads(width: int, head_size: int) -> Iterator[_Head]:
    for first in range(0, width, head_size):
        last = first + head_size
        end = min(width, -(-last // LANES) * LANES)
        yield _Head(slice(first // LANES * LANES, end), first, last)


def _product(a, b, contracted):
    return jax.lax.dot_general(
        a,
        b,
        (contracted, ((), ())),
        precision=layers.precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _forward_kernel(head_size, lengths, query, key, value, output):
    queries, keys, values = query[0], key[0], value[0]
    length = lengths[pl.program_id(0)]
    mixed = jnp.zeros(queries.shape, jnp.float32)
    for head in _heads(queries.shape[-1], head_size):
        scores = _product(head.only(queries), keys[:, head.window], ((1,), (1,)))
        frame = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(frame < length, scores, _HIDDEN_SCORE)
        weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
        total = weights.sum(axis=1, keepdims=True)
        sums = _product(weights.astype(values.dtype), values[:, head.window], ((1,), (0,)))
        mixed = _add(mixed, head, sums / total)
    output[0] = mixed.astype(output.dtype)


def _backward_kernel(
    head_size,
    lengths,
    query,
    key,
    value,
    gradient,
    query_gradient,
    key_gradient,
    value_gradient,
    bias_gradients,
    query_sum,
    key_sums,
    value_sums,
):
    """Scores stand with keys in rows here: their sums over keys go down the rows, which is cheap,
    and only one of the five products has to turn a matrix around."""
    block = pl.program_id(2)
    length = lengths[pl.program_id(0)]
    keys, values = key[0], value[0]
    # The last block of queries may reach beyond the frames, where anything can stand.
    row = jax.lax.broadcasted_iota(jnp.int32, query.shape[1:], 0) + block * query.shape[1]
    is_real = row < keys.shape[0]
    queries = jnp.where(is_real, query[0], jnp.zeros_like(query[0]))
    outputs = jnp.where(is_real, gradient[0], jnp.zeros_like(gradient[0]))

    @pl.when(block == 0)
    def _():
        query_sum[...] = jnp.zeros_like(query_sum)
        key_sums[...] = jnp.zeros_like(key_sums)
        value_sums[...] = jnp.zeros_like(value_sums)

    moved = jnp.zeros(queries.shape, jnp.float32)
    for head in _heads(queries.shape[-1], head_size):
        own_queries, own_outputs = head.only(queries), head.only(outputs)
        scores = _product(keys[:, head.window], own_queries, ((1,), (1,)))
        frame = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        scores = jnp.where(frame < length, scores, _HIDDEN_SCORE)
        weights = jnp.exp(scores - scores.max(axis=0, keepdims=True))
        weights = weights / weights.sum(axis=0, keepdims=True)
        by_weight = _product(values[:, head.window], own_outputs, ((1,), (1,)))
        by_score = weights * (by_weight - (weights * by_weight).sum(axis=0, keepdims=True))
        by_score = jnp.where(frame < length, by_score, 0.0).astype(keys.dtype)
        value_sums[:, head.window] += _product(
            weights.astype(keys.dtype), own_outputs, ((1,), (0,))
        )
        key_sums[:, head.window] += _product(by_score, own_queries, ((1,), (0,)))
        turned = _product(by_score, keys[:, head.window], ((0,), (0,)))
        moved = _add(moved, head, turned)
    moved = moved * head_size**-0.5
    query_gradient[0] = moved.astype(query_gradient.dtype)
    query_sum[:1] += moved.sum(axis=0, keepdims=True)

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        key_gradient[0] = key_sums[...].astype(key_gradient.dtype)
        value_gradient[0] = value_sums[...].astype(value_gradient.dtype)
        bias_gradients[0, 0:1] = query_sum[:1]
        bias_gradients[0, 1:2] = key_sums[...].sum(axis=0, keepdims=True)
        bias_gradients[0, 2:3] = value_sums[...].sum(axis=0, keepdims=True)


def _add(total, head, part):
    """`total` with a head's channels of `part`, which is as wide as the head's window."""
    lane = jax.lax.broadcasted_iota(jnp.int32, part.shape, 1) + head.window.start
    part = jnp.where((lane >= head.first) & (lane < head.last), part, 0.0)
    if part.shape == total.shape:
        return total + part
    before, end = head.window.start, head.window.stop
    pieces = [total[:, :before], total[:, head.window] + part, total[:, end:]]
    return jnp.concatenate([piece for piece in pieces if piece.shape[1]], axis=1)
