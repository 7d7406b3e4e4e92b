"""The columns and logsumexp of the logits for CTC, as a Pallas kernel for TPU that reads them once.

XLA reads all logits for the logsumexp, and again for the few columns that are a clip's labels. Here
a program holds some frames of a clip on the chip, with all their logits, and computes both. Logits
are [batch, vocab, frames] in memory, as XLA for TPU leaves them.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

_LANES, _SUBLANES, _ROWS = 128, 8, 128
_LARGEST_VOCABULARY = 10_240
"""With a larger vocabulary, the logits of a program do not fit on the chip."""


def suits(logits: jax.Array) -> bool:
    """Whether the kernel can compute logits of this shape and type."""
    small = logits.size > 0 and logits.shape[-1] <= _LARGEST_VOCABULARY
    return logits.dtype == jnp.float32 and small


def columns_and_norms(
    logits: Float[Array, "batch frames vocab"],
    columns: Int[Array, "batch columns"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "batch columns frames"], Float[Array, "batch frames"]]:
    """(Logits of the given vocabulary entries, logsumexp over all entries) of every frame, float32.

    Oracle: the same in XLA's operations, tests/test_ctc.py.
    """
    batch, frames, vocab = logits.shape
    count = columns.shape[1]
    lanes = min(frames, _LANES)

    def block(rows):
        return pl.BlockSpec((1, rows, lanes), lambda b, t, columns: (b, 0, t))

    chosen, norms = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(frames, lanes)),
            in_specs=[block(vocab)],
            out_specs=[block(count), block(1)],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, rows, frames), jnp.float32) for rows in (count, 1)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=4 * logits.size,
            transcendentals=logits.size,
            bytes_accessed=4 * (logits.size + batch * frames * (count + 1)),
        ),
        interpret=interpret,
        name="ctc_columns",
    )(columns.astype(jnp.int32), logits.swapaxes(1, 2))
    return chosen, norms[:, 0]


def _kernel(columns, logits, chosen, norms):
    clip, (_, vocab, lanes) = pl.program_id(0), logits.shape
    pieces, rest = divmod(vocab, _ROWS)

    def over_vocabulary(start, combine, reduce, prepare):
        """Reduces all entries [vocab, lanes] to [1, lanes], piece by piece."""

        def next_piece(piece, total):
            entries = logits[0, pl.ds(pl.multiple_of(piece * _ROWS, _ROWS), _ROWS), :]
            return combine(total, reduce(prepare(entries).reshape(-1, _SUBLANES, lanes), axis=0))

        total = jnp.full((_SUBLANES, lanes), start, jnp.float32)
        if pieces:
            total = jax.lax.fori_loop(0, pieces, next_piece, total)
        total = reduce(total, axis=0, keepdims=True)
        if rest:
            last = prepare(logits[0, vocab - rest :, :])
            total = combine(total, reduce(last, axis=0, keepdims=True))
        return total

    lowest = float(jnp.finfo(jnp.float32).min)
    high = over_vocabulary(lowest, jnp.maximum, jnp.max, lambda entries: entries)
    total = over_vocabulary(0.0, jnp.add, jnp.sum, lambda entries: jnp.exp(entries - high))
    norms[0] = high + jnp.log(total)

    def take(place, _):
        chosen[0, pl.ds(place, 1), :] = logits[0, pl.ds(columns[clip, place], 1), :]

    jax.lax.fori_loop(0, chosen.shape[1], take, None)
