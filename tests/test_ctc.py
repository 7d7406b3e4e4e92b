"""The CTC loss against torch where torch's loss is finite, against every alignment elsewhere."""

import functools
import importlib.util
import inspect
import itertools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from flax_asr import ctc, ctc_columns, ctc_kernel, plan
from flax_asr.estimate import chips

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def compiled(**options):
    """Losses, and the gradient of the weighted sum of the finite ones."""

    def weighted(logits, arguments, weights):
        loss = ctc.ctc_loss(logits, *arguments, **options)
        return (jnp.where(jnp.isfinite(loss), loss, 0) * weights).sum(), loss

    return jax.jit(jax.grad(weighted, has_aux=True))


def ours(logits, logit_lengths, labels, label_lengths, *, weights=None, **options):
    logits = np.asarray(logits)
    weights = np.ones(len(logits)) if weights is None else weights
    arguments = [jnp.asarray(x, jnp.int32) for x in (logit_lengths, labels, label_lengths)]
    with jax.enable_x64(logits.dtype == np.float64):
        gradient, loss = compiled(**options)(jnp.asarray(logits), arguments, jnp.asarray(weights))
        return np.asarray(loss), np.asarray(gradient)


@functools.cache
def compiled_plainly(**options):
    return jax.jit(jax.grad(lambda *arguments: ctc.ctc_loss(*arguments, **options).sum()))


def plain_gradient(logits, logit_lengths, labels, label_lengths, **options):
    """The gradient through nothing but the loss: what a careless sum over the batch would see."""
    arguments = [jnp.asarray(x, jnp.int32) for x in (logit_lengths, labels, label_lengths)]
    with jax.enable_x64(logits.dtype == np.float64):
        return np.asarray(compiled_plainly(**options)(jnp.asarray(logits), *arguments))


def torch_ctc(logits, logit_lengths, labels, label_lengths, blank, weights):
    scores = torch.tensor(logits, requires_grad=True)
    loss = torch.nn.functional.ctc_loss(
        scores.log_softmax(-1).transpose(0, 1),
        torch.tensor(labels),
        torch.tensor(logit_lengths),
        torch.tensor(label_lengths),
        blank=blank,
        reduction="none",
    )
    (loss * torch.tensor(weights, dtype=loss.dtype)).sum().backward()
    return loss.detach().numpy(), scores.grad.numpy()


def every_alignment(logits, labels, blank):
    """Loss and gradient of one clip by summing over all vocab**frames paths, in float64."""
    logits = np.asarray(logits, np.float64)
    frames, vocab = logits.shape
    softmax = np.exp(logits - logits.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    probability, visits = 0.0, np.zeros((frames, vocab))
    for path in itertools.product(range(vocab), repeat=frames):
        if [k for k, _ in itertools.groupby(path) if k != blank] == list(labels):
            of_path = np.prod(softmax[np.arange(frames), path])
            probability += of_path
            visits[np.arange(frames), path] += of_path
    if probability == 0:
        return np.inf, np.zeros((frames, vocab))
    return -np.log(probability), softmax - visits / probability


def random_batch(rng, batch=6, frames=40, vocab=11, tokens=9, blank=0):
    """Clips that all have an alignment, full of repeats, padded with nonsense."""
    symbols = np.delete(np.arange(vocab), blank)
    labels = rng.choice(symbols, (batch, tokens))
    labels[0] = symbols[0]
    label_lengths = rng.integers(0, tokens + 1, batch)
    label_lengths[:2] = tokens
    repeats = [
        np.count_nonzero(row[1:length] == row[: max(length - 1, 0)])
        for row, length in zip(labels, label_lengths, strict=True)
    ]
    shortest = label_lengths + repeats
    logit_lengths = rng.integers(np.maximum(shortest, 1), frames + 1)
    logit_lengths[1] = shortest[1]  # exactly one frame a label: one path
    logit_lengths[2] = frames
    return 3 * rng.standard_normal((batch, frames, vocab)), logit_lengths, labels, label_lengths


@pytest.mark.parametrize("blank", [0, 4, 10])
@pytest.mark.parametrize(("seed", "vocab"), [(0, 11), (1, 11), (2, 11), (3, 100)])
def test_loss_and_gradient_equal_torch_in_float64(seed, vocab, blank):
    rng = np.random.default_rng(seed)
    clips = random_batch(rng, vocab=vocab, blank=blank)
    weights = rng.uniform(0.1, 2, 6)
    loss, gradient = ours(*clips, blank=blank, weights=weights)
    expected_loss, expected_gradient = torch_ctc(*clips, blank, weights)
    assert np.isfinite(expected_loss).all()
    np.testing.assert_allclose(loss, expected_loss, rtol=0, atol=1e-10)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-10)


def test_long_clips_equal_torch_in_float64():
    rng = np.random.default_rng(7)
    clips = random_batch(rng, batch=4, frames=499, vocab=300, tokens=40)
    loss, gradient = ours(*clips)
    expected_loss, expected_gradient = torch_ctc(*clips, 0, np.ones(4))
    np.testing.assert_allclose(loss, expected_loss, rtol=0, atol=1e-10)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-10)


CASES = {
    "empty target": (5, [], 0),
    "one label": (4, [1], 0),
    "repeat": (5, [1, 1], 0),
    "repeats and others": (6, [2, 2, 1], 0),
    "one path only": (3, [1, 2, 1], 0),
    "one path only, with repeats": (5, [2, 2, 2], 0),
    "blank in the middle": (5, [0, 2, 0], 1),
    "blank last": (5, [0, 0, 1], 2),
    "too many labels": (2, [1, 2, 1], 0),
    "repeat without room": (3, [1, 1, 2], 0),
    "no frames, no labels": (0, [], 0),
    "no frames, one label": (0, [2], 0),
    "a label that is the blank": (5, [1, 0], 0),
    "a label past the vocabulary": (5, [1, 3], 0),
    "a negative label": (5, [-1, 2], 0),
}


@pytest.mark.parametrize("forbidden", ["nothing", "some", "a label", "the blank", "a frame"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_the_sum_over_all_alignments(case, forbidden):
    frames, target, blank = CASES[case]
    rng = np.random.default_rng(len(case))
    logits = rng.standard_normal((1, 8, 3)) * 2
    match forbidden:
        case "some":
            logits[rng.random(logits.shape) < 0.3] = -np.inf
        case "a label":
            logits[..., 2] = -np.inf
        case "the blank":
            logits[..., blank] = -np.inf
        case "a frame":
            logits[0, frames // 2] = -np.inf
    labels = np.array([[*target, -100, 1, 2, 1, 1][:5]])
    if forbidden == "a frame" and frames:
        expected_loss, expected = np.inf, np.zeros((frames, 3))
    else:
        expected_loss, expected = every_alignment(logits[0, :frames], target, blank)

    loss, gradient = ours(logits, [frames], labels, [len(target)], blank=blank)
    np.testing.assert_allclose(loss, [expected_loss], rtol=0, atol=1e-10)
    np.testing.assert_allclose(gradient[0, :frames], expected, rtol=0, atol=1e-10)
    assert (gradient[0, frames:] == 0).all()

    zeroed, _ = ours(logits, [frames], labels, [len(target)], blank=blank, zero_infinity=True)
    assert zeroed == (loss if np.isfinite(expected_loss) else 0)


LOGIT = st.floats(-20, 20) | st.just(-np.inf)


@settings(max_examples=60, deadline=None)
@given(
    hypothesis_numpy.arrays(np.float64, (1, 5, 3), elements=LOGIT),
    st.integers(0, 5),
    st.lists(st.integers(-1, 3), max_size=3),
    st.integers(0, 2),
)
def test_any_clip_costs_what_the_sum_over_all_its_alignments_says(logits, frames, target, blank):
    if np.isneginf(logits[0, :frames]).all(axis=-1).any():  # a frame that says nothing at all
        expected_loss, expected = np.inf, np.zeros((frames, 3))
    else:
        expected_loss, expected = every_alignment(logits[0, :frames], target, blank)
    labels = np.array([[*target, 1, 1, 1][:3]])
    loss, gradient = ours(logits, [frames], labels, [len(target)], blank=blank)
    np.testing.assert_allclose(loss, [expected_loss], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(gradient[0, :frames], expected, rtol=0, atol=1e-10)
    assert (gradient[0, frames:] == 0).all()


@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_clip_without_alignment_has_no_gradient_and_leaves_its_neighbours_alone(
    dtype, zero_infinity
):
    rng = np.random.default_rng(0)
    logits, logit_lengths, labels, label_lengths = random_batch(rng)
    logits = logits.astype(dtype)
    alone_loss, alone = ours(logits, logit_lengths, labels, label_lengths)
    logit_lengths[0] = 2 * labels.shape[1] - 2  # nine times the same label needs 17 frames
    logits[3, 0, :] = -np.inf
    loss, _ = ours(logits, logit_lengths, labels, label_lengths, zero_infinity=zero_infinity)
    gradient = plain_gradient(
        logits, logit_lengths, labels, label_lengths, zero_infinity=zero_infinity
    )
    assert (loss[[0, 3]] == (0 if zero_infinity else np.inf)).all()
    assert (gradient[[0, 3]] == 0).all()
    np.testing.assert_array_equal(loss[[1, 2, 4, 5]], alone_loss[[1, 2, 4, 5]])
    np.testing.assert_allclose(gradient[[1, 2, 4, 5]], alone[[1, 2, 4, 5]], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_forbidden_symbols_never_make_a_nan(seed):
    rng = np.random.default_rng(seed)
    logits, logit_lengths, labels, label_lengths = random_batch(rng, batch=32, frames=24)
    logits = logits.astype(np.float32) * 30
    logits[rng.random(logits.shape) < 0.02] = -np.inf
    logits[rng.random(logits.shape) < 0.01] = np.finfo(np.float32).min
    logits[1, 0, labels[1, 0]] = -np.inf  # this clip has one path only
    clips = logits, logit_lengths, labels, label_lengths
    loss, gradient = ours(*clips)
    assert not np.isnan(loss).any()
    assert (loss >= 0).all()
    assert loss[1] == np.inf
    assert np.isfinite(loss).sum() > 16
    assert np.isfinite(gradient).all()
    assert np.isfinite(plain_gradient(*clips)).all()


def test_a_clip_without_alignment_makes_no_nan_on_the_way():
    # jax_debug_nans, with which the source of a NaN is sought, would stop at each such clip.
    logits = np.random.default_rng(0).standard_normal((3, 5, 80)).astype(np.float32)
    logits[1, 2, :] = -np.inf
    labels = jnp.array([[1, 2, 1], [1, 2, 1], [1, 1, 1]])
    lengths = jnp.array([5, 5, 4]), jnp.array([3, 3, 3])

    def total(logits):
        return ctc.ctc_loss(logits, lengths[0], labels, lengths[1], zero_infinity=True).sum()

    with jax.debug_nans(True):
        gradient = np.asarray(jax.grad(total)(jnp.asarray(logits)))
    assert [bool(row.any()) for row in gradient] == [True, False, False]


def test_symbols_that_cannot_be_said_change_nothing():
    # With so many, the gradient is put together in another way.
    rng = np.random.default_rng(5)
    logits, logit_lengths, labels, label_lengths = random_batch(rng)
    logits[rng.random(logits.shape) < 0.02] = -np.inf
    labels[np.arange(labels.shape[1]) >= label_lengths[:, None]] = -100
    labels[4, 0] = 0
    more = np.pad(logits, ((0, 0), (0, 0), (0, 100)), constant_values=-np.inf)
    loss, gradient = ours(logits, logit_lengths, labels, label_lengths)
    more_loss, more_gradient = ours(more, logit_lengths, labels, label_lengths)
    assert np.isfinite(loss).any()
    assert np.isposinf(loss).any()
    np.testing.assert_allclose(more_loss, loss, rtol=0, atol=1e-12)
    np.testing.assert_allclose(more_gradient[..., :11], gradient, rtol=0, atol=1e-12)
    assert (more_gradient[..., 11:] == 0).all()


def test_what_lies_past_the_lengths_changes_nothing():
    rng = np.random.default_rng(3)
    logits, logit_lengths, labels, label_lengths = random_batch(rng)
    loss, gradient = ours(logits, logit_lengths, labels, label_lengths)
    past_frames = np.arange(logits.shape[1]) >= logit_lengths[:, None]
    past_labels = np.arange(labels.shape[1]) >= label_lengths[:, None]
    assert past_labels.any()
    for logit, label in [(np.nan, -100), (np.inf, -1), (-np.inf, 10**6), (1e30, 0)]:
        other_loss, other = ours(
            np.where(past_frames[..., None], logit, logits),
            logit_lengths,
            np.where(past_labels, label, labels),
            label_lengths,
        )
        np.testing.assert_array_equal(other_loss, loss)
        np.testing.assert_array_equal(other, gradient)
    assert (gradient[past_frames] == 0).all()


def test_more_padding_changes_nothing():
    rng = np.random.default_rng(4)
    logits, logit_lengths, labels, label_lengths = random_batch(rng)
    loss, gradient = ours(logits, logit_lengths, labels, label_lengths)
    wide_loss, wide = ours(
        np.pad(logits, ((0, 0), (0, 24), (0, 0))),
        logit_lengths,
        np.pad(labels, ((0, 0), (0, 7))),
        label_lengths,
    )
    np.testing.assert_allclose(wide_loss, loss, rtol=0, atol=1e-12)
    np.testing.assert_allclose(wide[:, :40], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("label_length", [-1, 4])
def test_an_impossible_label_length_costs_infinity(label_length):
    logits = np.random.default_rng(0).standard_normal((1, 9, 5))
    loss, gradient = ours(logits, [9], [[1, 2, 3]], [label_length])
    assert loss == np.inf
    assert (gradient == 0).all()


def test_no_label_columns_at_all():
    logits = np.random.default_rng(0).standard_normal((2, 4, 3))
    loss, gradient = ours(logits, [4, 2], np.zeros((2, 0)), [0, 0])
    for row, frames in enumerate([4, 2]):
        expected_loss, expected = every_alignment(logits[row, :frames], [], 0)
        np.testing.assert_allclose(loss[row], expected_loss, rtol=0, atol=1e-10)
        np.testing.assert_allclose(gradient[row, :frames], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("batch", "frames"), [(0, 4), (0, 0), (2, 0)])
def test_no_clips_or_no_frames_at_all(batch, frames):
    counts = jnp.zeros(batch, jnp.int32)
    labels = jnp.ones((batch, 2), jnp.int32)

    @jax.jit
    def both(logits):
        return jax.value_and_grad(
            lambda logits: ctc.ctc_loss(logits, counts, labels, counts).sum()
        )(logits)

    logits = jnp.ones((batch, frames, 3))
    loss, gradient = both(logits)
    assert (loss, gradient.shape) == (0, logits.shape)
    # A kernel that runs no program writes no results.
    on_tpu = both.trace(logits).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in on_tpu


@pytest.mark.parametrize("shift", [0, 300], ids=["fresh head", "confident and wrong"])
def test_float32_is_at_least_as_exact_as_torch(shift):
    rng = np.random.default_rng(5)
    logits, logit_lengths, labels, label_lengths = random_batch(
        rng, batch=8, frames=499, vocab=200, tokens=40
    )
    logits = (logits / 3).astype(np.float32)
    logits[..., 0] += shift / 10
    arguments = logit_lengths, labels, label_lengths
    true_loss, true_gradient = torch_ctc(logits.astype(np.float64), *arguments, 0, np.ones(8))
    torch_loss, torch_gradient = torch_ctc(logits, *arguments, 0, np.ones(8))
    loss, gradient = ours(logits, *arguments)
    assert loss.dtype == gradient.dtype == np.float32
    assert np.abs(loss - true_loss).max() <= np.abs(torch_loss - true_loss).max()
    assert np.abs(gradient - true_gradient).max() <= np.abs(torch_gradient - true_gradient).max()


def test_the_series_for_a_logarithm_is_exact_to_three_units_in_the_last_place():
    ratios = np.concatenate([np.linspace(0, 1, 100_001), np.logspace(-37, 0, 10_001)])
    ratios = ratios.astype(np.float32)
    exact = np.log1p(ratios.astype(np.float64))
    found = np.asarray(ctc._log_one_plus(ratios), np.float64)
    assert (np.abs(found - exact) < 3 * np.spacing(exact.astype(np.float32))).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    rng = np.random.default_rng(6)
    logits, *arguments = random_batch(rng, frames=120)
    logits = logits.astype(dtype)
    loss, gradient = ours(logits, *arguments)
    full_loss, full_gradient = ours(logits.astype(np.float32), *arguments)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(loss, full_loss)
    # Rounded once, at the end: at most half a unit in the last place.
    np.testing.assert_array_equal(gradient, full_gradient.astype(dtype))


def test_the_gradient_by_a_product_as_on_tpu_equals_that_by_columns():
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((4, 30, 200)).astype(np.float32)
    labels = rng.integers(1, 200, (4, 7)).astype(np.int32)
    labels[1] = [5, 5, 9, 5, 5, 9, 5]  # the same columns several times
    logit_lengths = np.array([30, 24, 3, 30], np.int32)  # the third has no alignment
    label_lengths = np.array([7, 7, 7, 0], np.int32)
    loss, residuals = ctc._loss_forward(0, logits, logit_lengths, labels, label_lengths)
    assert np.isposinf(loss).tolist() == [False, False, True, False]
    _, log_norms, frame_mask, columns, weights, _ = residuals
    counts = frame_mask & ~jnp.isposinf(loss)[:, None]
    scale = jnp.array([1.0, 2.0, 3.0, 4.0])[:, None, None]
    arguments = logits, log_norms, columns, weights, counts, scale
    by_product, by_columns = (
        np.asarray(form(*arguments))
        for form in (ctc._gradient_by_product, ctc._gradient_by_columns)
    )
    assert not by_product[2].any()
    np.testing.assert_allclose(by_product, by_columns, atol=2e-6)


def test_a_certain_transcript_costs_nothing_and_never_less():
    logits = np.full((1, 499, 8), -40.0, np.float32)
    path = np.repeat([0, 1, 0, 2, 3, 0, 3, 0], [100, 50, 49, 100, 60, 40, 60, 40])
    logits[0, np.arange(499), path] = np.random.default_rng(0).uniform(40, 80, 499)
    loss, _ = ours(logits, [499], [[1, 2, 3, 3]], [4])
    assert 0 <= loss[0] < 1e-6
    assert not np.signbit(loss[0])


@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("column", [0, 1, 5], ids=["blank", "label", "other"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_overflow_in_the_model_stays_visible(bad, column, zero_infinity):
    rng = np.random.default_rng(8)
    logits = rng.standard_normal((3, 12, 6)).astype(np.float32)
    logits[1, 4, column] = bad
    logits[2, 4, column] = bad
    labels = np.array([[1, 2, 1], [1, 2, 1], [-5, 2, 1]])  # the last has no alignment either
    clips = logits, [12, 12, 12], labels, [3, 3, 3]
    loss, _ = ours(*clips, zero_infinity=zero_infinity)
    gradient = plain_gradient(*clips, zero_infinity=zero_infinity)
    assert np.isfinite(loss[0])
    assert np.isnan(loss[1:]).all()
    assert np.isfinite(gradient[0]).all()
    assert not np.isfinite(gradient[1]).all()
    assert not np.isfinite(gradient[2]).all()


def test_a_blank_outside_the_vocabulary_is_refused():
    arguments = jnp.zeros((1, 4, 3)), jnp.array([4]), jnp.array([[1]]), jnp.array([1])
    for blank in (-1, 3):
        with pytest.raises(ValueError, match=rf"blank must lie in 0..2, got {blank}"):
            ctc.ctc_loss(*arguments, blank=blank)


def test_pmap_and_vmap_give_what_jit_gives():
    rng = np.random.default_rng(9)
    logits, logit_lengths, labels, label_lengths = random_batch(rng)
    clips = (
        logits.astype(np.float32),
        logit_lengths.astype(np.int32),
        labels.astype(np.int32),
        label_lengths.astype(np.int32),
    )

    def total(logits, *arguments):
        return ctc.ctc_loss(logits, *arguments).sum()

    loss, gradient = ours(*clips)
    halves = [array.reshape(2, 3, *array.shape[1:]) for array in clips]
    for transform in (jax.pmap, jax.vmap):
        # Without gradient the loss has a program of its own.
        alone = np.concatenate(transform(ctc.ctc_loss)(*halves))
        np.testing.assert_allclose(alone, loss, rtol=1e-6)
        together = np.concatenate(transform(jax.grad(total))(*halves))
        np.testing.assert_allclose(together, gradient, rtol=0, atol=1e-6)


def test_memory_does_not_grow_with_the_vocabulary():
    batch, frames, tokens = 8, 200, 20

    def temporary_bytes(vocab):
        shapes = (
            jax.ShapeDtypeStruct((batch, frames, vocab), jnp.float32),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
            jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
        )
        total = jax.value_and_grad(lambda *arguments: ctc.ctc_loss(*arguments).sum())
        return jax.jit(total).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(500), temporary_bytes(4000)
    assert 0 < small <= 10 * batch * frames * (tokens + 1) * 4
    assert large <= small


@pytest.mark.parametrize(
    ("frames", "rows", "tokens", "block_bytes"),
    [
        (40, 6, 9, 2**19),
        (23, 16, 130, 2**15),
        (5, 3, 0, 2**19),
        (7, 8, 127, 2**13),
    ],
)
def test_the_kernel_for_tpu_goes_the_way_of_the_scan(
    frames, rows, tokens, block_bytes, monkeypatch
):
    monkeypatch.setattr(ctc_kernel, "_BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(frames)
    scores = rng.normal(size=(frames, rows, tokens + 1)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    is_repeat = rng.random((rows, tokens)) < 0.3
    begin = np.where(np.arange(tokens + 1) == rng.integers(0, tokens + 1, (rows, 1)), 0.0, -np.inf)
    begin = begin.astype(np.float32)
    kernel = functools.partial(ctc_kernel.reach, ctc._log_add, interpret=True)
    ours, theirs = (jax.jit(form)(begin, scores, is_repeat) for form in (kernel, ctc._scan))
    assert np.isfinite(theirs[1][0]).any()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, theirs)


@pytest.mark.parametrize("frames", [0, 1, 7, 8, 11])
def test_several_frames_a_turn_as_on_gpu_go_the_same_way(frames):
    rng = np.random.default_rng(frames)
    scores = rng.normal(size=(frames, 3, 6)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    is_repeat = rng.random((3, 5)) < 0.3
    begin = np.where(np.arange(6) == [[0], [2], [5]], 0.0, -np.inf).astype(np.float32)
    by_turns = functools.partial(ctc._scan, frames_a_turn=ctc._FRAMES_A_TURN)
    ours, theirs = (jax.jit(form)(begin, scores, is_repeat) for form in (by_turns, ctc._scan))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, theirs)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_what_is_compiled_for_gpu_takes_several_frames_a_turn(platform):
    """Each start of a kernel costs more there than its arithmetic."""
    logits, labels = jax.ShapeDtypeStruct((2, 30, 7), jnp.float32), jnp.ones((2, 4), jnp.int32)

    def turns(platform):
        loss = jax.jit(lambda x: ctc.ctc_loss(x, jnp.array([30, 9]), labels, jnp.array([4, 2])))
        text = loss.trace(logits).lower(lowering_platforms=(platform,)).as_text()
        return [
            int(n) for n in re.findall(r"cond \{\s+\S+ = stablehlo.constant dense<(\d+)>", text)
        ]

    assert turns("cpu") == [30]
    # The frames that are left over stand behind the loop.
    assert turns(platform) == [30 // ctc._FRAMES_A_TURN]


@pytest.mark.parametrize(
    ("frames", "vocab", "tokens"), [(40, 7, 4), (300, 128, 130), (130, 300, 0), (1, 1000, 3)]
)
def test_the_kernel_for_tpu_takes_the_same_columns_and_norms(frames, vocab, tokens):
    rng = np.random.default_rng(frames)
    logits = rng.normal(size=(3, frames, vocab)).astype(np.float32) * 30
    columns = rng.integers(0, vocab, (3, tokens + 1))
    logits[0, 0, columns[0, 0]] = -np.inf
    logits[1, 0] = -np.inf
    logits[2, 0, vocab // 2] = np.nan
    logits[2, frames // 2, 0] = np.inf
    kernel = functools.partial(ctc_columns.columns_and_norms, interpret=True)
    chosen, norms = jax.jit(kernel)(logits, columns)
    np.testing.assert_array_equal(chosen, ctc._take(logits, columns))
    expected = ctc._log_sum_exp(jnp.asarray(logits))
    assert np.isfinite(expected).sum() == expected.size - (2 if frames == 1 else 3)
    np.testing.assert_allclose(norms, expected, rtol=1e-6)


@pytest.mark.parametrize(("vocab", "kernels"), [(7, 2), (20_000, 1)])
def test_what_is_compiled_for_tpu_has_the_kernels_and_no_loop(vocab, kernels):
    logits, labels = jax.ShapeDtypeStruct((2, 30, vocab), jnp.float32), jnp.ones((2, 4), jnp.int32)

    def gradient(logits):
        return jax.grad(
            lambda x: ctc.ctc_loss(x, jnp.array([30, 9]), labels, jnp.array([4, 2])).sum()
        )(logits)

    exported = {
        p: jax.export.export(jax.jit(gradient), platforms=[p])(logits) for p in ("tpu", "cpu")
    }
    text = {platform: program.mlir_module() for platform, program in exported.items()}
    assert text["tpu"].count("custom_call @tpu_custom_call") == kernels
    assert "stablehlo.while" not in text["tpu"]
    assert "tpu_custom_call" not in text["cpu"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:1x1", "v4:2x2x1", "v5p:2x2x1", "v6e:2x4"])
@pytest.mark.parametrize(("frames", "vocab"), [(504, 4000), (2000, 10_240), (90, 33)])
def test_the_real_tpu_compiler_takes_the_kernel_of_columns(topology, frames, vocab):
    device = plan.describe(chips.parse(topology)).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    logits = jax.ShapeDtypeStruct((8, frames, vocab), jnp.float32, sharding=sharding)
    columns = jax.ShapeDtypeStruct((8, 41), jnp.int32, sharding=sharding)

    @jax.jit
    def kernel(logits, columns):
        assert ctc_columns.suits(logits)
        return ctc_columns.columns_and_norms(logits, columns)

    text = kernel.trace(logits, columns).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert "tpu_custom_call" in text


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("logits", lambda array: array[0]),
        ("logit_lengths", lambda array: array[:1]),  # which would serve every clip
        ("logit_lengths", lambda array: array[:, None]),
        (
            "logit_lengths",
            lambda array: np.zeros((3, 7), np.float32),
        ),  # paddings, as optax has them
        ("logit_lengths", lambda array: array.astype(np.float32)),
        ("label_lengths", lambda array: array[:1]),
        ("label_lengths", lambda array: array[0]),
        ("labels", lambda array: array[:1]),
        ("labels", lambda array: array[0]),
        ("labels", lambda array: array.astype(np.float32)),
    ],
)
def test_another_shape_or_type_is_refused_by_name(name, wrong):
    """In a process whose signatures are not checked, as a user's."""
    given = {
        "logits": np.zeros((3, 7, 5), np.float32),
        "logit_lengths": np.full(3, 7),
        "labels": np.ones((3, 2), np.int32),
        "label_lengths": np.full(3, 2),
    }
    plain = inspect.unwrap(ctc.ctc_loss)
    assert np.isfinite(plain(**given)).all()
    with pytest.raises(ValueError, match=f"^{name} has the shape"):
        plain(**given | {name: wrong(given[name])})


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64])
def test_integers_of_any_width_mean_the_same(dtype):
    """In a process whose signatures are not checked, as a user's."""
    plain = inspect.unwrap(ctc.ctc_loss)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 60, 300)).astype(np.float32)
    labels = np.zeros((2, 300), np.int32)
    labels[:, :3] = [[100, 90, 7], [3, 3, 0]]
    lengths, label_lengths = np.array([60, 50]), np.array([3, 2])

    def both(dtype):
        def loss(logits):
            narrow = (array.astype(dtype) for array in (lengths, labels, label_lengths))
            losses = plain(logits, *narrow)
            return losses.sum(), losses

        return jax.grad(loss, has_aux=True)(logits)

    for found, right in zip(both(dtype), both(np.int32), strict=True):
        assert np.isfinite(right).all()
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("vocab", [5, 70], ids=["by product", "by columns"])
def test_second_derivatives_are_differences_of_gradients(vocab):
    rng = np.random.default_rng(0)
    logits, direction = rng.normal(size=(2, 1, 6, vocab))
    with jax.enable_x64(True):
        arguments = [jnp.array(x, jnp.int32) for x in ([6], [[1, 2, 2]], [3])]

        @jax.jit
        def gradient(logits):
            return jax.grad(lambda logits: ctc.ctc_loss(logits, *arguments).sum())(logits)

        again = jax.grad(lambda logits: (gradient(logits) * direction).sum())(logits)
        step = 1e-5 * direction
        differences = (gradient(logits + step) - gradient(logits - step)) / 2e-5
    np.testing.assert_allclose(again, differences, atol=1e-9)
