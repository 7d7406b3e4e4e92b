"""Connectionist temporal classification: the loss, with its own gradient.

Let N be the number of labels of a clip. The states of an alignment are N + 1 blanks (before label
0, ..., after label N - 1) and N labels. `reach[t, s]` is the log-probability of everything that
can happen before frame t and leads to state s there, `leave[t, s]` that of everything after it;
neither contains frame t itself, so no probability is ever divided out again and -inf is safe.

Both come from one scan: read backwards in time and in labels, `leave` is `reach` of the reversed
clip, so the reversed clips are stacked under the clips. Padding frames become free blanks, which
leave every path where it is: clips of all lengths then start and end together.

Only the columns of the blank and of the clip's own labels take part; the rest of the vocabulary
enters through one logsumexp a frame, and no normalised copy of the logits is kept.

Source: Graves et al. 2006, "Connectionist temporal classification", equations 5-16.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
        ValueError: `blank` lies outside the vocabulary.

    Source: Graves et al. 2006, equations 5-16. Oracles: torch.nn.functional.ctc_loss and the sum
    over all alignments, tests/test_ctc.py.
    """
    vocab = logits.shape[-1]
    if not 0 <= blank < vocab:
        raise ValueError(f"blank must lie in 0..{vocab - 1}, got {blank}")
    loss = _loss(blank, logits, logit_lengths, labels, label_lengths)
    return jnp.where(jnp.isposinf(loss), 0, loss) if zero_infinity else loss


class _Problem(NamedTuple):
    """What the recursion sees of a batch. Scores are logits less an offset a frame."""

    log_norms: Float[Array, "batch frames"]  # logsumexp over the vocabulary
    frame_mask: Bool[Array, "batch frames"]
    columns: Int[Array, "batch columns"]  # vocabulary entries: the blank, then the labels
    cost: Float[Array, " batch"]  # what the offsets and the log_norms take from the paths
    blank_scores: Float[Array, "batch frames"]
    label_scores: Float[Array, "batch frames tokens"]
    is_repeat: Bool[Array, "batch tokens"]  # equal to the label before


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(blank, logits, logit_lengths, labels, label_lengths):
    problem = _problem(blank, logits, logit_lengths, labels, label_lengths)
    last, _ = _reach(
        problem.blank_scores, problem.label_scores, problem.is_repeat, jnp.zeros_like(label_lengths)
    )
    return _total(problem, last, label_lengths)


def _loss_forward(blank, logits, logit_lengths, labels, label_lengths):
    problem = _problem(blank, logits, logit_lengths, labels, label_lengths)
    batch, tokens = labels.shape
    # A label may be skipped to from the one before: in reverse the repeat belongs to the other one.
    repeats_next = jnp.pad(problem.is_repeat[:, 1:], ((0, 0), (0, 1)))
    last, (blanks, symbols) = _reach(
        _stack(problem.blank_scores, problem.blank_scores[:, ::-1]),
        _stack(problem.label_scores, problem.label_scores[:, ::-1, ::-1]),
        _stack(problem.is_repeat, repeats_next[:, ::-1]),
        _stack(jnp.zeros_like(label_lengths), tokens - label_lengths),
    )
    loss = _total(problem, tuple(state[:batch] for state in last), label_lengths)

    # The states of a frame share all paths between them: normalising over them, rather than by the
    # loss, keeps the rounding of hundreds of steps out of the gradient.
    def through(states):
        return jnp.moveaxis(states[:, :batch] + states[::-1, batch:, ::-1], 0, 1)

    through_blanks = through(blanks) + problem.blank_scores[..., None]
    through_labels = through(symbols) + problem.label_scores
    peak = _finite(jnp.maximum(through_blanks.max(-1), through_labels.max(-1, initial=-jnp.inf)))[
        ..., None
    ]
    blank_weights = jnp.exp(through_blanks - peak).sum(-1, keepdims=True)
    label_weights = jnp.exp(through_labels - peak)
    weights = jnp.concatenate([blank_weights, label_weights], -1)
    # At least 1 wherever there is a path at all.
    total = jnp.maximum(blank_weights + label_weights.sum(-1, keepdims=True), 1)
    posteriors = weights / total

    residuals = (logits, problem.log_norms, problem.frame_mask, problem.columns, posteriors, loss)
    return loss, residuals


def _loss_backward(blank, residuals, cotangents):
    logits, log_norms, frame_mask, columns, posteriors, loss = residuals
    counts = (frame_mask & ~jnp.isposinf(loss)[:, None])[..., None]
    scale = cotangents[:, None, None]

    def softmax(scores):
        return jnp.exp(scores.astype(log_norms.dtype) - log_norms[..., None])

    everywhere = jnp.where(counts, softmax(logits) * scale, 0).astype(logits.dtype)

    # A label that occurs twice owns one column: add its posteriors up first, then write each
    # column once, rounded once. Equal values make the order of the writes irrelevant.
    same = (columns[:, :, None] == columns[:, None, :]).astype(posteriors.dtype)
    merged = jnp.einsum("btm,bmn->btn", posteriors, same, precision=jax.lax.Precision.HIGHEST)
    needed = jnp.where(counts, (softmax(_take(logits, columns)) - merged) * scale, 0)
    rows = jnp.arange(columns.shape[0])[:, None]
    gradient = everywhere.at[rows, :, columns].set(needed.astype(logits.dtype).swapaxes(1, 2))
    return gradient, None, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _problem(blank, logits, logit_lengths, labels, label_lengths) -> _Problem:
    dtype = jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
    _, frames, vocab = logits.shape
    frame_mask = jnp.arange(frames) < logit_lengths[:, None]
    label_mask = jnp.arange(labels.shape[1]) < label_lengths[:, None]
    usable = label_mask & (labels >= 0) & (labels < vocab) & (labels != blank)

    # Unusable labels borrow the blank's column to have one, and are forbidden below.
    columns = jnp.pad(jnp.where(usable, labels, blank), ((0, 0), (1, 0)), constant_values=blank)
    log_norms = _log_sum_exp(logits.astype(dtype))
    scores = _take(logits, columns).astype(dtype)
    scores = jnp.where(
        jnp.pad(usable, ((0, 0), (1, 0)), constant_values=True)[:, None], scores, -jnp.inf
    )

    # With the best column of each frame at 0 the sums over paths stay small and lose few bits.
    # `blank` is among the columns, so the padding labels that share it do not move the best.
    offsets = _finite(scores.max(-1))
    scores = scores - offsets[..., None]
    is_repeat = jnp.pad(labels[:, 1:] == labels[:, :-1], ((0, 0), (1, 0)))
    return _Problem(
        log_norms=log_norms,
        frame_mask=frame_mask,
        columns=columns,
        cost=jnp.where(frame_mask, _finite(log_norms) - offsets, 0).sum(-1),
        blank_scores=jnp.where(frame_mask, scores[..., 0], 0),
        label_scores=jnp.where(frame_mask[..., None], scores[..., 1:], -jnp.inf),
        is_repeat=is_repeat,
    )


def _reach(blank_scores, label_scores, is_repeat, start):
    """Scan the frames from blank number `start`; the states after the last frame, and of each.

    States are (blanks [rows tokens+1], labels [rows tokens]); those of a frame, stacked in time,
    are without the frame's own score.
    """
    rows, _, tokens = label_scores.shape
    begin = jnp.arange(tokens + 1) == start[:, None]
    begin = jnp.where(begin, 0.0, -jnp.inf).astype(label_scores.dtype)

    def step(states, scores):
        blanks, symbols = states
        blank_score, label_score = scores
        before = jnp.pad(symbols, ((0, 0), (1, 0)), constant_values=-jnp.inf)
        to_blanks = _log_add(blanks, before)
        to_symbols = _log_add(symbols, jnp.where(is_repeat, blanks[:, :-1], to_blanks[:, :-1]))
        after = (to_blanks + blank_score[:, None], to_symbols + label_score)
        return after, (to_blanks, to_symbols)

    return jax.lax.scan(
        step,
        (begin, jnp.full((rows, tokens), -jnp.inf, label_scores.dtype)),
        (jnp.moveaxis(blank_scores, 1, 0), jnp.moveaxis(label_scores, 1, 0)),
    )


def _total(problem, last, label_lengths):
    """Loss from the states after the last frame."""
    blanks, symbols = last
    ends = jnp.arange(blanks.shape[1]) == label_lengths[:, None]
    candidates = jnp.concatenate(
        [jnp.where(ends, blanks, -jnp.inf), jnp.where(ends[:, 1:], symbols, -jnp.inf)], 1
    )
    # Rounding may lift a certain transcript just above probability 1.
    return jnp.maximum(problem.cost - _log_sum_exp(candidates), 0)


def _take(logits, columns):
    return jnp.take_along_axis(logits, columns[:, None, :], axis=2, mode="clip")


def _stack(clips, reversed_clips):
    return jnp.concatenate([clips, reversed_clips])


def _finite(values):
    return jnp.maximum(values, jnp.finfo(values.dtype).min)


def _log_add(a, b):
    # Where both are -inf, the floor makes the difference -inf and not NaN.
    high = jnp.maximum(a, b)
    return high + jnp.log(1 + jnp.exp(jnp.minimum(a, b) - _finite(high)))


def _log_sum_exp(values):
    high = _finite(values.max(-1))
    return high + jnp.log(jnp.exp(values - high[..., None]).sum(-1))
