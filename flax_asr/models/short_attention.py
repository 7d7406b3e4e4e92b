"""Attention over the frames of short clips as a Pallas kernel for TPU.

XLA writes the scores of every head to memory and reads them back several times: for clips of ten
seconds that takes five times as long as the matrix products of a layer. Here a program holds the
scores of one clip, a few heads and a block of queries on the chip. Only queries, keys, values,
output and their gradients are read from and written to memory; the backward pass computes the
scores again.

Arrays stay [batch, frames, hidden], as the projections return them. A block is the fewest whole
heads that fill whole lanes (two heads of 64 channels, eight of 80), or all channels. A head is not
cut out of its lanes: its neighbours are set to zero in one factor of each product, which costs
nothing, as the matrix unit is as wide as the lanes.

Dropout of the weights equals that of the plain form to the bit: a hash of the index in the whole
array [batch, heads, queries, keys], computed again in the backward pass.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt32

from flax_asr.models import layers

LANES = 128
QUERIES = 512
"""The most queries that a program takes at once."""
_SCORE_BYTES = 10 * 2**20
"""Memory for all score matrices of a program: long clips take fewer queries at once."""
LONGEST_FRAMES = {2: 2048, 4: 1024}
"""By bytes of an element: 41 and 20 seconds of audio. Longer clips do not fit on the chip."""

_HASH_FLOPS = 24 * 16
"""Estimated cost of dropout for a score: its vector operations in the compiler's schedule, times
the matrix operations (half-filled) that take as long as one of them."""
_HIDDEN_SCORE = -1e30  # for padding; finite, so that a clip without frames gives no NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 5))
def attend(
    products: tuple[Float[Array, "batch frames hidden"], ...],
    biases: tuple[Float[Array, " hidden"], ...],
    lengths: Int[Array, " batch"],
    heads: int,
    words: UInt32[Array, "2"] | None = None,
    dropout: float = 0.0,
) -> Float[Array, "batch frames hidden"]:
    """softmax(query key^T / sqrt(channels)) value, over the first `lengths` frames of each clip.

    Products are in the arrays' dtype with float32 sums, the softmax is float32. A clip without
    frames attends to all frames equally. Runs on TPU, and interpreted on CPU.

    Args:
        products: query, key and value before their biases are added, as the kernel also computes
            the biases' gradients.
        biases: the biases of query, key and value.
        lengths: real frames of each clip.
        heads: number of heads that share the hidden channels.
        words: key words for dropout of the softmax's weights; None: no dropout.
        dropout: the rate of dropout.

    Oracles: the plain form in attention.py and PyTorch, tests/models/test_attention.py.
    """
    return _forward(products, biases, lengths, heads, words, dropout)[0]


def _forward(products, biases, lengths, heads, words, dropout):
    dtype, head_size = products[0].dtype, products[0].shape[-1] // heads
    query, key, value = (layers.plus_bias(x, b) for x, b in zip(products, biases, strict=True))
    query = query * jnp.asarray(head_size**-0.5, dtype)
    (mixed,) = _call(_forward_kernel, heads, lengths, words, dropout, query, key, value)
    return mixed, (query, key, value, lengths, words, biases)


def _backward(heads, dropout, residuals, gradient):
    query, key, value, lengths, words, biases = residuals
    found = _call(_backward_kernel, heads, lengths, words, dropout, query, key, value, gradient)
    # Without the barrier XLA for TPU keeps [1, hidden] up to AdamW, which then takes two passes.
    sums = jax.lax.optimization_barrier([total[0] for total in found[3:]])
    sums = tuple(total.astype(bias.dtype) for total, bias in zip(sums, biases, strict=True))
    return tuple(found[:3]), sums, None, None


attend.defvjp(_forward, _backward)


def _call(kernel, heads, lengths, words, dropout, *arrays):
    """Runs a kernel over (blocks of heads, clips, blocks of queries).

    Query, output and their gradients are cut by query, the others are whole. Clips come one after
    another, so that the biases' gradients of a block of heads stay on the chip.
    """
    batch, frames, hidden = arrays[0].shape
    head_size = hidden // heads
    width = math.lcm(head_size, LANES)
    if hidden % width:
        width = hidden
    bytes_a_score = _bytes_a_score(width, head_size, arrays[0].dtype.itemsize)
    queries = _queries(frames, bytes_a_score)
    whole_lanes = pl.cdiv(frames, LANES) * LANES
    by_query = pl.BlockSpec((1, queries, width), lambda h, b, q, *scalars: (b, q, h))
    whole = pl.BlockSpec((1, frames, width), lambda h, b, q, *scalars: (b, 0, h))
    like = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
    if kernel is _forward_kernel:
        products, in_specs, out_specs = 2, [by_query, whole, whole], [by_query]
        results, scratch = [like], []
    else:
        total = pl.BlockSpec((1, width), lambda h, b, q, *scalars: (0, h))
        products, in_specs = 5, [by_query, whole, whole, by_query]
        out_specs = [by_query, whole, whole, total, total, total]
        results = [like] * 3 + [jax.ShapeDtypeStruct((1, hidden), jnp.float32)] * 3
        scratch = [pltpu.VMEM((frames, width), jnp.float32) for _ in range(2)]
    scalars = [lengths.astype(jnp.int32)] if words is None else [lengths.astype(jnp.int32), words]
    scores = batch * heads * frames * whole_lanes
    hashing = 0 if words is None else _HASH_FLOPS * scores

    def body(*references):
        here = _Program(head_size, heads, frames, dropout, *references[: len(scalars)])
        kernel(here, *references[len(scalars) :])

    def run(*operands, interpret):
        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(hidden // width, batch, pl.cdiv(frames, queries)),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=results,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=_vmem_bytes(
                    frames, queries, width, like.dtype.itemsize, bytes_a_score
                ),
            ),
            cost_estimate=pl.CostEstimate(
                # The matrix unit takes whole lanes of one of the two.
                flops=products * 2 * scores * head_size + hashing,
                transcendentals=batch * heads * frames * frames,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *results)),
            ),
            interpret=interpret,
            name=kernel.__name__.strip("_"),
        )(*operands)

    return jax.lax.platform_dependent(
        *scalars,
        *arrays,
        cpu=functools.partial(run, interpret=True),
        default=functools.partial(run, interpret=False),
    )


def _queries(frames: int, bytes_a_score: int) -> int:
    """Queries that a program takes at once: all of a short clip, else whole tiles of them."""
    fitting = _SCORE_BYTES // (bytes_a_score * frames) // LANES * LANES
    return min(frames, QUERIES, max(fitting, LANES))


def _bytes_a_score(width: int, head_size: int, itemsize: int) -> int:
    """What the compiler keeps on the chip of a score: float32 matrices, some of every head."""
    return 4 * (2 + width // head_size) * itemsize // 2


def _vmem_bytes(frames, queries, width, itemsize, bytes_a_score):
    """Blocks twice, as the next ones arrive meanwhile; sums, and parts of float32; scores."""
    blocks = (3 * queries + 4 * frames) * width * itemsize * 2
    sums = 4 * frames * width * itemsize
    return 4 * 2**20 + blocks + sums + bytes_a_score * queries * frames


class _Program(NamedTuple):
    """What one of the kernel's programs is about.

    Attributes:
        head_size, heads, frames: of the whole arrays.
        dropout: its rate.
        lengths: real frames of every clip.
        words: key words of the dropout; None: there is none.
    """

    head_size: int
    heads: int
    frames: int
    dropout: float
    lengths: Any
    words: Any = None

    @property
    def length(self):
        """Real frames of this clip."""
        return self.lengths[pl.program_id(1)]

    def dropped(self, weights, head: "_Head", query_axis: int):
        """Weights, or their gradients, of this block of queries after dropout, but for its scale.

        Queries lie along `query_axis`, keys along the other.
        """
        if self.words is None:
            return weights
        clip, first_head = pl.program_id(1), pl.program_id(0) * (head.width // self.head_size)
        of_head = clip * self.heads + first_head + head.first // self.head_size
        queries = weights.shape[query_axis]
        of_block = (of_head * self.frames + pl.program_id(2) * queries) * self.frames
        query, key = (
            jax.lax.broadcasted_iota(jnp.uint32, weights.shape, axis)
            for axis in (query_axis, 1 - query_axis)
        )
        places = of_block.astype(jnp.uint32) + query * jnp.uint32(self.frames) + key
        is_kept = layers.kept(places, (self.words[0], self.words[1]), self.dropout)
        return jnp.where(is_kept, weights, 0.0)

    @property
    def scale(self) -> float:
        """What `dropped` leaves to be multiplied with."""
        return 1.0 if self.words is None else layers.kept_scale(self.dropout)


class _Head(NamedTuple):
    """Where a head's channels lie in a block: the lane tiles around them, and which lanes."""

    window: slice
    first: int
    last: int
    width: int  # of the block

    def only(self, x):
        """The window of `x`, with zeros in other heads' channels."""
        x = x[:, self.window]
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + self.window.start
        return jnp.where((lane >= self.first) & (lane < self.last), x, jnp.zeros_like(x))


def _heads(width: int, head_size: int) -> Iterator[_Head]:
    for first in range(0, width, head_size):
        last = first + head_size
        end = min(width, -(-last // LANES) * LANES)
        yield _Head(slice(first // LANES * LANES, end), first, last, width)


def _product(a, b, contracted):
    return jax.lax.dot_general(
        a,
        b,
        (contracted, ((), ())),
        precision=layers.precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _forward_kernel(here, query, key, value, output):
    queries, keys, values = query[0], key[0], value[0]
    mixed = jnp.zeros(queries.shape, jnp.float32)
    for head in _heads(queries.shape[-1], here.head_size):
        scores = _product(head.only(queries), keys[:, head.window], ((1,), (1,)))
        frame = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(frame < here.length, scores, _HIDDEN_SCORE)
        weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
        total = weights.sum(axis=1, keepdims=True)
        weights = here.dropped(weights, head, query_axis=0).astype(values.dtype)
        sums = _product(weights, values[:, head.window], ((1,), (0,)))
        mixed = _add(mixed, head, sums * here.scale / total)
    output[0] = mixed.astype(output.dtype)


def _backward_kernel(
    here,
    query,
    key,
    value,
    gradient,
    query_gradient,
    key_gradient,
    value_gradient,
    query_bias_gradient,
    key_bias_gradient,
    value_bias_gradient,
    key_sums,
    value_sums,
):
    """Scores stand with keys in rows here: their sums over keys go down the rows, which is cheap,
    and only one of the five products has to transpose a matrix."""
    block = pl.program_id(2)
    keys, values = key[0], value[0]
    # The last block of queries may reach beyond the frames, where anything can stand.
    row = jax.lax.broadcasted_iota(jnp.int32, query.shape[1:], 0) + block * query.shape[1]
    is_real = row < keys.shape[0]
    queries = jnp.where(is_real, query[0], jnp.zeros_like(query[0]))
    outputs = jnp.where(is_real, gradient[0], jnp.zeros_like(gradient[0]))

    def add_up(bias_gradient, rows, is_first):
        # Not by `pl.when`, which would keep the compiler from mixing what is before and behind.
        before = jnp.where(is_first, 0.0, bias_gradient[...])
        bias_gradient[...] = before + rows.sum(axis=0, keepdims=True)

    first_clip = pl.program_id(1) == 0

    @pl.when(block == 0)
    def _():
        key_sums[...] = jnp.zeros_like(key_sums)
        value_sums[...] = jnp.zeros_like(value_sums)

    query_sums = jnp.zeros(queries.shape, jnp.float32)
    for head in _heads(queries.shape[-1], here.head_size):
        own_queries, own_outputs = head.only(queries), head.only(outputs)
        scores = _product(keys[:, head.window], own_queries, ((1,), (1,)))
        frame = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        scores = jnp.where(frame < here.length, scores, _HIDDEN_SCORE)
        weights = jnp.exp(scores - scores.max(axis=0, keepdims=True))
        weights = weights / weights.sum(axis=0, keepdims=True)
        weight_gradient = _product(values[:, head.window], own_outputs, ((1,), (1,)))
        weight_gradient = here.dropped(weight_gradient, head, query_axis=1) * here.scale
        score_gradient = weights * (
            weight_gradient - (weights * weight_gradient).sum(axis=0, keepdims=True)
        )
        score_gradient = jnp.where(frame < here.length, score_gradient, 0.0).astype(keys.dtype)
        weights = (here.dropped(weights, head, query_axis=1) * here.scale).astype(keys.dtype)
        value_sums[:, head.window] += _product(weights, own_outputs, ((1,), (0,)))
        key_sums[:, head.window] += _product(score_gradient, own_queries, ((1,), (0,)))
        part = _product(score_gradient, keys[:, head.window], ((0,), (0,)))
        query_sums = _add(query_sums, head, part)
    query_sums = query_sums * here.head_size**-0.5
    query_gradient[0] = query_sums.astype(query_gradient.dtype)
    add_up(query_bias_gradient, query_sums, first_clip & (block == 0))

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        key_gradient[0] = key_sums[...].astype(key_gradient.dtype)
        value_gradient[0] = value_sums[...].astype(value_gradient.dtype)
        add_up(key_bias_gradient, key_sums[...], first_clip)
        add_up(value_bias_gradient, value_sums[...], first_clip)


def _add(total, head, part):
    """`total` with a head's channels of `part`, which is as wide as the head's window."""
    lane = jax.lax.broadcasted_iota(jnp.int32, part.shape, 1) + head.window.start
    part = jnp.where((lane >= head.first) & (lane < head.last), part, 0.0)
    if part.shape == total.shape:
        return total + part
    before, end = head.window.start, head.window.stop
    pieces = [total[:, :before], total[:, head.window] + part, total[:, end:]]
    return jnp.concatenate([piece for piece in pieces if piece.shape[1]], axis=1)
