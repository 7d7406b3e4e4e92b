"""The batch plan against brute force, and its promises as properties."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_asr import errors
from flax_asr.data import buckets
from flax_asr.data.buckets import EvalPlan, TrainPlan, choose_shapes, row_shapes, smallest_samples

FEW = st.lists(st.integers(400, 60_000), min_size=1, max_size=8).map(
    lambda values: np.array(values, np.int32)
)
# Lists are mostly short, and of a few clips there is little to choose.
MANY = st.builds(
    lambda clips, seed: np.random.default_rng(seed).integers(400, 60_000, clips).astype(np.int32),
    st.integers(9, 60),
    st.integers(0, 2**32 - 1),
)
LENGTHS = FEW | MANY


def frames(samples: int, kernels=(10, 3, 3, 3, 3, 2, 2), strides=(5, 2, 2, 2, 2, 2, 2)) -> int:
    for kernel, stride in zip(kernels, strides, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def zh_hk_like(clips: int) -> np.ndarray:
    """Lengths between 1 and 10.5 s with a mean of 4.15 s, as in zh-HK 25.0."""
    seconds = np.random.default_rng(0).gamma(9.0, 4.15 / 9.0, clips)
    return (np.clip(seconds, 1.0, 10.5) * 16_000).astype(np.int32)


def brute_force_cost(samples: np.ndarray, shapes: tuple[int, ...], group_rows: int) -> int:
    """Padded samples of an epoch, by filling groups one bucket after the other."""
    cost, waiting = 0, 0
    for low, high in itertools.pairwise((0, *shapes)):
        waiting += int(((samples > low) & (samples <= high)).sum())
        cost += waiting // group_rows * group_rows * high
        waiting %= group_rows
    return cost + (group_rows * shapes[-1] if waiting else 0)


def test_smallest_samples_are_the_fewest_that_make_the_frames():
    for count in (1, 2, 16, 499):
        assert smallest_samples(count) == 320 * count + 80
        assert frames(smallest_samples(count)) == count
        assert frames(smallest_samples(count) - 1) == count - 1
    small = {"kernels": (32, 8, 4), "strides": (16, 5, 4)}
    assert frames(smallest_samples(48, **small), **small) == 48
    assert frames(smallest_samples(48, **small) - 1, **small) == 47


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 4))
def test_shapes_are_the_best_of_all_possible_ones(samples, num_buckets):
    shapes = choose_shapes(samples, num_buckets)
    assert 1 <= len(shapes) <= num_buckets
    assert shapes[-1] >= samples.max()
    assert shapes == tuple(sorted(set(shapes)))
    assert all((shape - 80) % (320 * 16) == 0 for shape in shapes)
    top = shapes[-1]
    assert top - 320 * 16 < samples.max()
    candidates = range(320 * 16 + 80, top, 320 * 16)
    best = min(
        brute_force_cost(samples, (*edges, top), group_rows=1)
        for count in range(num_buckets)
        for edges in itertools.combinations(candidates, min(count, len(candidates)))
    )
    assert brute_force_cost(samples, shapes, group_rows=1) == best


def test_no_shape_is_compiled_that_saves_nothing():
    """Of equally good choices the one with the fewest programs."""
    assert len(choose_shapes(np.full(9, 30_000), 12)) == 1
    assert len(choose_shapes(np.array([6_000, 30_000] * 9), 12)) == 2


def test_shapes_follow_the_strides_they_are_given():
    def frame_samples(count):
        return smallest_samples(count, kernels=(32, 8, 4), strides=(16, 5, 4))

    shapes = choose_shapes(zh_hk_like(500), 5, frame_samples=frame_samples)
    assert all(frames(s, (32, 8, 4), (16, 5, 4)) % 16 == 0 for s in shapes)
    assert all(frames(s - 1, (32, 8, 4), (16, 5, 4)) % 16 == 15 for s in shapes)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_every_row_is_seen_exactly_once_an_epoch(samples, num_buckets, rows, groups, seed):
    shapes = choose_shapes(samples, num_buckets)
    plan = TrainPlan(samples, shapes, rows, groups, seed)
    assert plan.updates_per_epoch == -(-len(samples) // (rows * groups))
    for epoch in range(2):
        updates = [
            plan.update(epoch * plan.updates_per_epoch + update)
            for update in range(plan.updates_per_epoch)
        ]
        assert all(len(update) == groups for update in updates[:-1])
        assert 1 <= len(updates[-1]) <= groups
        seen = np.concatenate([group.rows for update in updates for group in update])
        assert sorted(seen[seen >= 0]) == list(range(len(samples)))
        assert (seen < 0).sum() == -len(samples) % rows
        padded = 0
        for group in itertools.chain.from_iterable(updates):
            assert group.rows.dtype == np.int32
            assert group.rows.shape == (rows,)
            assert samples[group.rows[group.rows >= 0]].max() <= shapes[group.shape]
            padded += rows * shapes[group.shape]
        assert plan.padding == pytest.approx(1 - samples.sum() / padded, abs=1e-12)
        assert padded == brute_force_cost(samples, shapes, rows)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 6), st.integers(1, 5))
def test_evaluation_sees_every_row_once(samples, num_buckets, rows):
    shapes = choose_shapes(samples, num_buckets)
    plan = EvalPlan(samples, shapes, rows)
    groups = list(plan)
    assert len(groups) == len(plan) == -(-len(samples) // rows)
    seen = np.concatenate([group.rows for group in groups])
    assert sorted(seen[seen >= 0]) == list(range(len(samples)))
    assert all(samples[g.rows[g.rows >= 0]].max() <= shapes[g.shape] for g in groups)
    padded = sum(rows * shapes[group.shape] for group in groups)
    assert padded == brute_force_cost(samples, shapes, rows)
    assert plan.padding == pytest.approx(1 - samples.sum() / padded, abs=1e-12)


def test_the_plan_is_a_function_of_seed_and_step():
    samples = zh_hk_like(300)
    shapes = choose_shapes(samples, 4)
    plan = TrainPlan(samples, shapes, 8, 4, seed=3)
    late = TrainPlan(samples, shapes, 8, 4, seed=3).update(10_007)
    for step in (0, 10_006, 10_007):
        plan.update(step)
    for ours, theirs in zip(plan.update(10_007), late, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_array_equal(ours.rows, theirs.rows)

    def order(plan, epoch):
        steps = range(epoch * plan.updates_per_epoch, (epoch + 1) * plan.updates_per_epoch)
        return [group.rows.tolist() for step in steps for group in plan.update(step)]

    assert order(plan, 0) != order(plan, 1)
    assert order(plan, 0) != order(TrainPlan(samples, shapes, 8, 4, seed=4), 0)


def test_the_plan_of_a_seed_never_changes():
    """A run that was started by an older version goes on with the same groups."""
    samples = np.arange(1000, 13_000, 1000, dtype=np.int32)
    plan = TrainPlan(samples, (5200, 10_320, 15_440), 4, 1, seed=42)
    found = [(g.shape, g.rows.tolist()) for s in range(3) for g in plan.update(s)]
    assert found == [(2, [7, 5, 10, 11]), (0, [4, 1, 3, 0]), (1, [2, 8, 9, 6])]


def test_lengths_of_an_epoch_are_computed_once():
    samples, asked = zh_hk_like(30), []

    def lengths(epoch):
        asked.append(epoch)
        return samples - epoch

    plan = TrainPlan(samples, choose_shapes(samples, 3), 4, 2, seed=0, lengths=lengths)
    for step in range(2 * plan.updates_per_epoch):
        for group in plan.update(step):
            np.testing.assert_array_equal(plan.lengths(group.epoch), samples - group.epoch)
    assert asked == [0, 1]


def test_groups_of_one_update_come_from_several_buckets():
    samples = zh_hk_like(2000)
    plan = TrainPlan(samples, choose_shapes(samples, 8), 8, 4, seed=0)
    mixed = [len({group.shape for group in plan.update(step)}) for step in range(60)]
    assert np.mean(mixed) > 2.5


def test_padding_goal_of_common_voice_lengths():
    samples = zh_hk_like(12_000)
    for num_buckets, goal in ((10, 0.92), (12, 0.93), (16, 0.95)):
        shapes = choose_shapes(samples, num_buckets)
        assert len(shapes) <= num_buckets
        assert 1 - TrainPlan(samples, shapes, 8, 4, seed=0).padding >= goal


def test_a_hundred_thousand_clips_are_planned_in_a_moment():
    samples = zh_hk_like(100_000)
    start = time.perf_counter()
    shapes = choose_shapes(samples, 12)
    TrainPlan(samples, shapes, 8, 4, seed=0).update(1_000_000)
    assert time.perf_counter() - start < 3.0


def test_a_clip_longer_than_every_shape_is_refused():
    with pytest.raises(errors.DataError, match=r"20000 samples is longer.*10320"):
        row_shapes(np.array([400, 20_000]), (5200, 10_320))
    with pytest.raises(errors.DataError, match="must ascend"):
        row_shapes(np.array([400]), (10_320, 5200))
    with pytest.raises(errors.DataError, match="no clips"):
        choose_shapes(np.array([], np.int32), 3)
    with pytest.raises(errors.DataError, match="no clips"):
        TrainPlan(np.array([], np.int32), (5200,), 2, 1, 0)
    assert buckets.FRAME_MULTIPLE == 16
