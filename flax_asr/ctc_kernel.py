"""The recursion of connectionist temporal classification as a Pallas kernel for TPU.

A loop in XLA starts several small programs for every frame, which takes a hundred times as long as
their arithmetic at 10 s of audio. Here one program goes through the frames with the states in
registers. It computes the same as `_scan` of ctc.py, in the same order.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

LANES, SUBLANES = 128, 8
_BLOCK_BYTES = 2**19
"""Bytes of scores that are on the chip at once."""

States = tuple[Float[Array, "rows states"], Float[Array, "rows tokens"]]
Stacked = tuple[Float[Array, "frames rows states"], Float[Array, "frames rows tokens"]]


def reach(
    log_add: Callable[[Array, Array], Array],
    begin: Float[Array, "rows states"],
    scores: Float[Array, "frames rows states"],
    is_repeat: Bool[Array, "rows tokens"],
    *,
    interpret: bool = False,
) -> tuple[States, Stacked]:
    """States (of blanks, of labels) after the last frame, and before each frame.

    Args:
        log_add: log(exp(a) + exp(b)).
        begin: states of the blanks before the first frame; each label starts as the blank before
            it.
        scores: scores of the blank and of the labels.
        is_repeat: which labels equal the one before.
        interpret: run it on a CPU, for tests.
    """
    frames, rows, states = scores.shape
    tall, wide = -(-rows // SUBLANES) * SUBLANES, -(-states // LANES) * LANES
    block = max(1, min(frames, _BLOCK_BYTES // (4 * tall * wide)))

    def fill(x, value):
        *outer, height, width = x.shape
        more = ((0, tall - height), (0, wide - width))
        return jnp.pad(x, ((0, 0),) * len(outer) + more, constant_values=value)

    by_frame = pl.BlockSpec((block, tall, wide), lambda i: (i, 0, 0))
    whole = pl.BlockSpec((tall, wide), lambda i: (0, 0))
    stacked = jax.ShapeDtypeStruct((frames, tall, wide), jnp.float32)
    single = jax.ShapeDtypeStruct((tall, wide), jnp.float32)
    results = pl.pallas_call(
        functools.partial(_kernel, log_add, frames),
        grid=(pl.cdiv(frames, block),),
        in_specs=[by_frame, whole, whole],
        out_specs=[by_frame, by_frame, whole, whole],
        out_shape=[stacked, stacked, single, single],
        scratch_shapes=[pltpu.VMEM((tall, wide), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="ctc_reach",
    )(fill(scores, -jnp.inf), fill(is_repeat.astype(jnp.int32), 0), fill(begin, -jnp.inf))
    blanks, labels, last_blanks, last_labels = (x[..., :rows, :states] for x in results)
    return (last_blanks, last_labels[:, :-1]), (blanks, labels[:, :, :-1])


def _kernel(
    log_add, frames, scores, is_repeat, begin, blanks, labels, last_blanks, last_labels, *states
):
    """A label's state is in the lane of the blank before it, its score one lane further."""
    block, _, wide = scores.shape
    first = pl.program_id(0) * block
    blank_state, label_state = states
    lane = jax.lax.broadcasted_iota(jnp.int32, begin.shape, 1)

    @pl.when(first == 0)
    def _():
        blank_state[...] = begin[...]
        label_state[...] = begin[...]

    def step(frame, before):
        blanks[frame], labels[frame] = before
        score = scores[frame]
        blank = before[0] + score[:, :1]
        symbol = before[1] + pltpu.roll(score, wide - 1, 1)
        behind = jnp.where(lane == 0, -jnp.inf, pltpu.roll(symbol, 1, 1))
        to_blank = log_add(blank, behind)
        one_back = jnp.where(is_repeat[...] != 0, blank, to_blank)
        return to_blank, log_add(symbol, one_back)

    after = jax.lax.fori_loop(
        0, jnp.minimum(block, frames - first), step, (blank_state[...], label_state[...])
    )
    blank_state[...], label_state[...] = after

    @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
    def _():
        last_blanks[...], last_labels[...] = after
