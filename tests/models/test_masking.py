"""SpecAugment's masks against transformers' own numpy function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.wav2vec2 import modeling_wav2vec2

from flax_asr.models import masking

pytestmark = pytest.mark.usefixtures("quick_compilation")

DRAWS = 1000


def reference(draws, lengths, frames, prob, length, min_spans):
    """[draws, batch, frames] from transformers, on real frames only.

    It marks the last frame of the padding of rows without a span, which nothing looks at.
    """
    np.random.seed(0)
    lengths = np.asarray(lengths)
    real = np.arange(frames) < lengths[:, None]
    drawn = [
        modeling_wav2vec2._compute_mask_indices(
            real.shape, prob, length, torch.tensor(real).long(), min_spans
        )
        for _ in range(draws)
    ]
    return np.stack(drawn) & real


def ours(draws, lengths, frames, prob, length, min_spans, first_key=0):
    def draw(key):
        return masking.time_mask(
            key, jnp.asarray(lengths), frames, prob=prob, length=length, min_spans=min_spans
        )

    return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(first_key), draws)))


CASES = {
    "seed recipe, time": ([60, 41, 17, 10, 9, 0], 60, 0.75, 10, 2),
    "default, time": ([70, 33, 12, 5], 70, 0.05, 10, 2),
    "no least number": ([50, 31, 11, 3], 50, 0.1, 4, 0),
    "single frames": ([40, 20, 1], 40, 0.5, 1, 1),
    "more than fit": ([30, 12], 30, 1.0, 10, 5),
    "seed recipe, features": ([256, 256], 256, 0.25, 64, 0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_masks_have_hugging_faces_distribution(case):
    theirs, mine = reference(DRAWS, *case), ours(DRAWS, *case)
    deviation = np.sqrt(theirs.var(axis=0) / DRAWS + mine.var(axis=0) / DRAWS)
    difference = np.abs(theirs.mean(axis=0) - mine.mean(axis=0))
    # how often each frame is masked: six standard errors, and one draw in case one is constant
    assert (difference <= 6.0 * deviation + 1.0 / DRAWS).all()
    theirs_counts, counts = theirs.sum(axis=-1), mine.sum(axis=-1)
    for row in range(counts.shape[1]):
        # how many frames of a row are masked, as a whole distribution (Kolmogorov-Smirnov)
        ladder = np.arange(case[1] + 1)
        below = (counts[:, row, None] <= ladder).mean(axis=0)
        theirs_below = (theirs_counts[:, row, None] <= ladder).mean(axis=0)
        assert np.abs(below - theirs_below).max() < 2.3 * np.sqrt(2.0 / DRAWS)


def stretches(masks):
    """Lengths of all unbroken stretches of masked frames, over draws and rows."""
    edges = np.diff(np.pad(masks, ((0, 0), (0, 0), (1, 1))).astype(np.int8), axis=-1)
    # In order, so that starts and ends of one row are neighbours.
    return np.argwhere(edges == -1)[:, -1] - np.argwhere(edges == 1)[:, -1]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_stretches_of_masked_frames_are_as_many_and_as_long_as_hugging_faces(case):
    _, frames, _, length, least = case
    theirs, mine = stretches(reference(DRAWS, *case)), stretches(ours(DRAWS, *case))
    assert min(mine) == min(theirs) == length
    assert abs(len(mine) / len(theirs) - 1) < 6 / np.sqrt(DRAWS)
    ladder = np.arange(frames + 1)
    below, theirs_below = ((found[:, None] <= ladder).mean(axis=0) for found in (mine, theirs))
    # Stretches of one draw are not independent: as if each draw had given one.
    assert np.abs(below - theirs_below).max() < 2.3 * np.sqrt(2.0 / DRAWS)
    if least:
        masked = ours(DRAWS, *case).sum(axis=-1)
        room = np.array(case[0]) >= length
        assert masked[:, room].min() >= length
        assert not masked[:, ~room].any()


def test_rows_of_a_batch_share_the_rounding_but_not_the_starts():
    # 2.5 spans of one frame expected: every row of a batch gets two, or every row gets three
    masks = ours(400, [10] * 4, 10, 0.25, 1, 0)
    counts = masks.sum(axis=-1)
    assert (counts == counts[:, :1]).all()
    assert 0.4 < (counts[:, 0] == 3).mean() < 0.6
    assert (masks[:, 0] != masks[:, 1]).any(axis=-1).mean() > 0.9


def test_spans_stay_inside_their_row_and_short_rows_stay_unmasked():
    lengths = np.array([60, 25, 10, 9, 1, 0])
    masks = ours(300, lengths, 60, 0.75, 10, 2)
    assert not (masks & (np.arange(60) >= lengths[:, None])).any()
    assert not masks[:, 3:].any()
    assert masks[:, 2, :10].all()  # room for just one span, and two are the least


def test_seed_recipe_masks_the_share_that_hugging_face_masks():
    time = ours(200, [199] * 4, 199, 0.75, 10, 2)
    assert time.mean() == pytest.approx(0.546, abs=0.01)

    def draw(key):
        return masking.feature_mask(key, 4, 1024, prob=0.25, length=64, min_spans=0)

    features = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 200))
    assert float(features.mean()) == pytest.approx(0.226, abs=0.01)


def test_feature_masks_are_time_masks_of_full_rows():
    key = jax.random.key(3)
    lengths = jnp.full((3,), 48)
    arguments = {"prob": 0.4, "length": 6, "min_spans": 1}
    expected = masking.time_mask(key, lengths, 48, **arguments)
    np.testing.assert_array_equal(masking.feature_mask(key, 3, 48, **arguments), expected)
    assert expected.any()


@pytest.mark.parametrize(("prob", "length"), [(0.0, 10), (0.75, 41)])
def test_nothing_is_masked_without_probability_or_room(prob, length):
    assert not ours(20, [40, 20], 40, prob, length, 2).any()


def test_equal_keys_give_equal_masks_and_others_do_not():
    case = CASES["seed recipe, time"]
    np.testing.assert_array_equal(ours(5, *case), ours(5, *case))
    assert (ours(5, *case) != ours(5, *case, first_key=1)).any()


def test_starts_are_the_least_draws_the_first_ones_where_they_are_equal():
    rng = np.random.default_rng(0)
    draws = rng.integers(0, 6, (200, 17)).astype(np.float32)
    counts = rng.integers(0, 18, 200)
    ranks = draws.argsort(axis=-1, kind="stable").argsort(axis=-1)
    np.testing.assert_array_equal(masking._least(draws, counts), ranks < counts[:, None])
