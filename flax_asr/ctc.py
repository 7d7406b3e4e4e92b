"""Connectionist temporal classification: the loss, with its own gradient.

Let N be the number of labels of a clip. The states of an alignment are N + 1 blanks (before label
0, ..., after label N - 1) and N labels. `reach[t, s]` is the log-probability of everything that
can happen before frame t and leads to state s there, `leave[t, s]` that of everything after it.
They are the forward and backward variables (alpha and beta), but neither contains frame t itself:
so no probability is ever divided out again, and -inf is safe.

Both come from one scan: read backwards in time and in labels, `leave` is `reach` of the reversed
clip, so the reversed clips are appended to the batch. Padding frames become free blanks, which
leave every path where it is: clips of all lengths then start and end together. On TPU a kernel
takes the place of the scan (ctc_kernel.py); on GPU one step takes several frames.

Only the columns of the blank and of the clip's own labels are needed; the rest of the vocabulary
enters through one logsumexp per frame, and no normalised copy of the logits is kept. On TPU a
kernel reads the logits once for both (ctc_columns.py).

Source: Graves et al. 2006, "Connectionist temporal classification", equations 5-16.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_asr import ctc_columns, ctc_kernel

_FEW_SYMBOLS = 64
"""Up to so many symbols, a matrix product over all is faster than a gather and a scatter."""

_FRAMES_A_TURN = 4
"""Frames per iteration of the scan on GPU, where starting a kernel takes longer than its work: XLA
makes six kernels of one frame and of four; of more it makes larger ones that recompute much."""


def ctc_loss(
    logits: Float[Array, "batch frames vocab"],
    logit_lengths: Int[Array, " batch"],
    labels: Int[Array, "batch tokens"],
    label_lengths: Int[Array, " batch"],
    *,
    blank: int = 0,
    zero_infinity: bool = False,
) -> Float[Array, " batch"]:
    """Negative log-likelihood of each transcript, in nats.

    Computed in float32 (float64 if given it) whatever the dtype of `logits`; the gradient comes
    back in the dtype of `logits`. Frames and labels past their lengths count for nothing, whatever
    they hold: their gradient is zero, and labels may be padded with any number.

    A transcript without an alignment costs infinity, or 0 with `zero_infinity`; its gradient is
    exactly zero. That is so when labels and repeats outnumber the frames, when -inf logits forbid
    every path or a whole frame, when a label is the blank or lies outside the vocabulary, and when
    a label length is negative or more than `tokens`. No frames and no labels cost 0.

    A NaN or +inf logit in a real frame makes that clip's loss NaN, also with `zero_infinity`, and
    its gradient not finite, so that an overflow in the model is seen and not trained on.

    Raises:
        ValueError: `blank` lies outside the vocabulary, or an array has another shape or type.

    Source: Graves et al. 2006, equations 5-16. Oracles: torch.nn.functional.ctc_loss and the sum
    over all alignments, tests/test_ctc.py.
    """
    _check(logits, logit_lengths, labels, label_lengths)
    vocab = logits.shape[-1]
    if not 0 <= blank < vocab:
        raise ValueError(f"blank must lie in 0..{vocab - 1}, got {blank}")
    # They are compared with sizes, and a size such as 300 does not fit in eight bits.
    lengths_and_labels = (_wide(array) for array in (logit_lengths, labels, label_lengths))
    loss = _loss(blank, logits, *lengths_and_labels)
    return jnp.where(jnp.isposinf(loss), 0, loss) if zero_infinity else loss


def _wide(integers: Array) -> Array:
    integers = jnp.asarray(integers)
    return integers.astype(jnp.promote_types(integers.dtype, jnp.int32))


def _check(logits, logit_lengths, labels, label_lengths) -> None:
    """Refuses what would be broadcast, and the masks that `optax.ctc_loss` takes, not lengths."""
    if jnp.ndim(logits) != 3:
        raise ValueError(
            f"logits has the shape {jnp.shape(logits)}: it must be [batch frames vocab]"
        )
    batch = len(logits)
    lengths = (("logit_lengths", logit_lengths), ("label_lengths", label_lengths))
    for name, array, dims in (*((*one, 1) for one in lengths), ("labels", labels, 2)):
        shape, dtype = jnp.shape(array), jnp.result_type(array)
        if len(shape) != dims or shape[0] != batch or not jnp.issubdtype(dtype, jnp.integer):
            form = "batch tokens" if dims == 2 else "batch"
            raise ValueError(
                f"{name} has the shape {shape} and type {dtype}: it must be integers, [{form}], of"
                f" {batch} clips"
            )


class _Problem(NamedTuple):
    """The input of the recursion for a batch. Column 0 is the blank's, the others the labels'."""

    log_norms: Float[Array, "batch frames"]  # logsumexp over the vocabulary, never -inf
    frame_mask: Bool[Array, "batch frames"]
    columns: Int[Array, "batch columns"]  # vocabulary entries
    scores: Float[Array, "frames batch columns"]  # logits minus an offset per frame
    cost: Float[Array, " batch"]  # sum of log_norms minus offsets, the same for every path
    is_repeat: Bool[Array, "batch tokens"]  # equal to the label before


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(blank, logits, logit_lengths, labels, label_lengths):
    problem = _problem(blank, logits, logit_lengths, labels, label_lengths)
    (blanks, _), _ = _reach(problem.scores, problem.is_repeat, jnp.zeros_like(label_lengths))
    return _total(problem, blanks, label_lengths)


def _loss_forward(blank, logits, logit_lengths, labels, label_lengths):
    problem = _problem(blank, logits, logit_lengths, labels, label_lengths)
    batch, tokens = labels.shape

    def flip_labels(columns):
        return jnp.concatenate([columns[..., :1], columns[..., :0:-1]], -1)

    # Between two labels in reverse, the repeat belongs to the other one.
    is_repeat_reversed = jnp.pad(problem.is_repeat[:, :0:-1], ((0, 0), (min(tokens, 1), 0)))
    scores = jnp.concatenate([problem.scores, flip_labels(problem.scores)[::-1]], 1)
    (blanks, _), states = _reach(
        scores,
        jnp.concatenate([problem.is_repeat, is_repeat_reversed]),
        jnp.concatenate([jnp.zeros_like(label_lengths), tokens - label_lengths]),
    )
    loss = _total(problem, blanks[:batch], label_lengths)

    reach_and_leave = [state[:, :batch] + state[::-1, batch:, ::-1] for state in states]
    through_blanks = reach_and_leave[0] + scores[:, :batch, :1]
    through_labels = reach_and_leave[1] + scores[:, :batch, 1:]
    # Relative to the frame's best state: only ratios within a frame matter to the gradient, and
    # the rounding errors that all its states share cancel.
    best = jnp.maximum(through_blanks.max(-1), through_labels.max(-1, initial=-jnp.inf))
    best = _finite(best)[..., None]
    weights = jnp.concatenate(
        [
            jnp.exp(through_blanks - best).sum(-1, keepdims=True),
            jnp.exp(through_labels - best),
        ],
        -1,
    )
    return loss, (logits, problem.log_norms, problem.frame_mask, problem.columns, weights, loss)


def _loss_backward(blank, residuals, cotangents):
    logits, log_norms, frame_mask, columns, weights, loss = residuals
    counts = frame_mask & ~jnp.isposinf(loss)[:, None]
    arguments = (logits, log_norms, columns, weights, counts, cotangents[:, None, None])
    if logits.shape[-1] <= _FEW_SYMBOLS:
        return _gradient_by_product(*arguments), None, None, None
    gradient = jax.lax.platform_dependent(
        *arguments, tpu=_gradient_by_product, default=_gradient_by_columns
    )
    return gradient, None, None, None


def _gradient_by_product(logits, log_norms, columns, weights, counts, scale):
    """Moves posteriors to their vocabulary entries by a product with a matrix of zeros and ones."""
    entries = jnp.arange(logits.shape[-1])
    owns = (columns[..., None] == entries).astype(weights.dtype)
    merged = jnp.einsum("tbm,bmv->btv", weights, owns, precision=jax.lax.Precision.HIGHEST)
    difference = _probabilities(logits, log_norms) - merged / _totals(weights)[..., None]
    return jnp.where(counts[..., None], difference * scale, 0).astype(logits.dtype)


def _gradient_by_columns(logits, log_norms, columns, weights, counts, scale):
    """Writes posteriors into the columns that they belong to."""
    probabilities = _probabilities(logits, log_norms)
    gradient = jnp.where(counts[..., None], probabilities * scale, 0).astype(logits.dtype)
    # A label that occurs twice owns one column: its weights are added up first, then every needed
    # column is written once, rounded once. Equal values make the order of the writes irrelevant.
    same = (columns[:, :, None] == columns[:, None, :]).astype(weights.dtype)
    merged = jnp.einsum("tbm,bmn->bnt", weights, same, precision=jax.lax.Precision.HIGHEST)
    posteriors = merged / _totals(weights)[:, None]
    needed = jnp.exp(_take(logits, columns).astype(log_norms.dtype) - log_norms[:, None])
    needed = jnp.where(counts[:, None], (needed - posteriors) * scale, 0).astype(logits.dtype)
    rows = jnp.arange(columns.shape[0])[:, None]
    return gradient.at[rows, :, columns].set(needed)


def _probabilities(logits, log_norms):
    return jnp.exp(logits.astype(log_norms.dtype) - log_norms[..., None])


def _totals(weights):
    """The weight of all states, [batch frames]. The best state weighs 1; padding may have none."""
    return jnp.maximum(weights.sum(-1), 1).T


_loss.defvjp(_loss_forward, _loss_backward)


def _problem(blank, logits, logit_lengths, labels, label_lengths) -> _Problem:
    dtype = jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
    _, frames, vocab = logits.shape
    frame_mask = jnp.arange(frames) < logit_lengths[:, None]
    label_mask = jnp.arange(labels.shape[1]) < label_lengths[:, None]
    usable = label_mask & (labels >= 0) & (labels < vocab) & (labels != blank)

    # Unusable labels borrow the blank's column to have one, and are forbidden below. So the best
    # column of a frame is the blank's or a usable label's; with it at 0, sums over paths stay
    # small and lose few bits.
    columns = jnp.pad(jnp.where(usable, labels, blank), ((0, 0), (1, 0)), constant_values=blank)
    scores, log_norms = _columns_and_norms(logits, columns, dtype)
    log_norms = _finite(log_norms)
    offsets = _finite(scores.max(1))
    usable = jnp.pad(usable, ((0, 0), (1, 0)), constant_values=True)
    scores = jnp.where(usable[..., None], scores - offsets[:, None], -jnp.inf)
    free_blank = jnp.where(jnp.arange(columns.shape[1]) == 0, 0, -jnp.inf)
    scores = jnp.where(frame_mask[:, None], scores, free_blank[:, None])

    return _Problem(
        log_norms=log_norms,
        frame_mask=frame_mask,
        columns=columns,
        scores=jnp.transpose(scores, (2, 0, 1)),
        cost=jnp.where(frame_mask, log_norms - offsets, 0).sum(-1),
        is_repeat=jnp.pad(labels[:, 1:] == labels[:, :-1], ((0, 0), (min(labels.shape[1], 1), 0))),
    )


def _reach(scores, is_repeat, start):
    """Log-probabilities of reaching each state from blank number `start` of each row.

    Returns the states (blanks [rows tokens+1], labels [rows tokens]) after the last frame, and
    those of every frame, stacked in time, without the frame's own score.
    """
    _, tokens = is_repeat.shape
    begin = jnp.arange(tokens + 1) == start[:, None]
    begin = jnp.where(begin, 0, -jnp.inf).astype(scores.dtype)
    if scores.dtype != jnp.float32 or not scores.size:
        return _scan(begin, scores, is_repeat)
    return jax.lax.platform_dependent(
        begin,
        scores,
        is_repeat,
        tpu=functools.partial(ctc_kernel.reach, _log_add),
        cuda=functools.partial(_scan, frames_a_turn=_FRAMES_A_TURN),
        rocm=functools.partial(_scan, frames_a_turn=_FRAMES_A_TURN),
        default=_scan,
    )


def _scan(begin, scores, is_repeat, frames_a_turn=1):
    def step(states, frame_scores):
        blanks = states[0] + frame_scores[:, :1]
        symbols = states[1] + frame_scores[:, 1:]
        before = jnp.pad(symbols, ((0, 0), (1, 0)), constant_values=-jnp.inf)
        to_blanks = _log_add(blanks, before)
        # A path that may step to the blank before a label may skip it, unless that is a repeat.
        one_back = jnp.where(is_repeat, blanks[:, :-1], to_blanks[:, :-1])
        return (to_blanks, _log_add(symbols, one_back)), states

    return jax.lax.scan(step, (begin, begin[:, :-1]), scores, unroll=frames_a_turn)


def _total(problem, blanks, label_lengths):
    """The loss, from the blanks after the last frame: paths end in the one after the last label."""
    ends = jnp.arange(blanks.shape[1]) == label_lengths[:, None]
    # Rounding may lift a certain transcript just above probability 1.
    return jnp.maximum(problem.cost - jnp.where(ends, blanks, -jnp.inf).max(-1), 0)


def _columns_and_norms(logits, columns, dtype):
    """(Vocabulary entries of every frame [batch columns frames], logsumexp [batch frames])."""

    def plain(logits, columns):
        return _take(logits, columns).astype(dtype), _log_sum_exp(logits.astype(dtype))

    if not ctc_columns.suits(logits):
        return plain(logits, columns)
    return jax.lax.platform_dependent(
        logits, columns, tpu=ctc_columns.columns_and_norms, default=plain
    )


def _take(logits, columns):
    """The given vocabulary entries of every frame, [batch columns frames]."""
    return logits[jnp.arange(columns.shape[0])[:, None], :, columns]


def _finite(values):
    return jnp.maximum(values, jnp.finfo(values.dtype).min)


def _log_add(a, b):
    # Where both are -inf, the floor makes the difference -inf and not NaN.
    high = jnp.maximum(a, b)
    ratio = jnp.exp(jnp.minimum(a, b) - _finite(high))
    return high + _log_one_plus(ratio)


def _log_one_plus(ratio):
    """log(1 + ratio) for 0 <= ratio <= 1; in float32 within three units in the last place.

    The library's logarithm covers all numbers and takes about a sixth of the loss's time on a CPU
    with 32 symbols. Source: log(1 + x) = 2 artanh(x / (2 + x)); the first term left out, at x = 1,
    is 2 / (15 * 3**15) = 9e-9.
    """
    if ratio.dtype == jnp.float64:
        return jnp.log1p(ratio)
    argument = ratio / (2 + ratio)
    square = argument * argument
    series = 1 / 13
    for power in (11, 9, 7, 5, 3, 1):
        series = series * square + 1 / power
    return 2 * argument * series


def _log_sum_exp(values):
    high = _finite(values.max(-1))
    return high + jnp.log(jnp.exp(values - high[..., None]).sum(-1))
