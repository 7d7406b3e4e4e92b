"""Batches: the right content in static shapes, the same on any number of hosts, from any step."""

import dataclasses
import gc
import itertools
import threading
import time

import numpy as np
import pytest
from small_splits import write_split

from flax_asr import errors
from flax_asr.data import features, loader
from flax_asr.data.buckets import EvalPlan, TrainPlan, choose_shapes
from flax_asr.data.examples import build
from flax_asr.data.loader import Batch, Prefetched, assemble, evaluation, label_widths, updates
from flax_asr.vocabulary import Vocabulary

CLIPS = 23


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    sentences = ["abcde"[: 1 + i % 5] * (1 + i % 3) for i in range(CLIPS)]
    split = write_split(
        tmp_path_factory.mktemp("split"),
        sentences,
        samples=rng.integers(7000, 40_000, CLIPS).tolist(),
    )
    return build(
        [split],
        normalize=str.strip,
        vocabulary=Vocabulary.from_transcripts(sentences),
        frame_lengths=lambda samples: (samples - 80) // 320,
    )


@pytest.fixture(scope="module")
def shapes(data):
    return choose_shapes(data.samples, 4)


def check(data, shapes, batch: Batch, rows, shape: int):
    """Compares with the plainest possible padding."""
    assert batch.audio.dtype == np.int16
    assert batch.audio.shape == (len(rows), shapes[shape])
    assert batch.labels.shape == (len(rows), label_widths(data, shapes)[shape])
    for place, row in enumerate(rows):
        real = row >= 0
        audio = data.audio(row) if real else np.zeros(0, np.int16)
        labels = data.labels(row) if real else np.zeros(0, np.int32)
        padded = np.pad(audio, (0, shapes[shape] - len(audio)))
        np.testing.assert_array_equal(batch.audio[place], padded)
        assert batch.sample_lengths[place] == len(audio)
        assert batch.label_lengths[place] == len(labels)
        np.testing.assert_array_equal(batch.labels[place, : len(labels)], labels)
        assert not batch.labels[place, len(labels) :].any()
        assert batch.weights[place] == (1.0 if real else 0.0)
        if real:
            assert batch.gains[place] == data.gains[row]


def test_batches_hold_their_rows_padded_with_zeros(data, shapes):
    plan = TrainPlan(data.samples, shapes, 4, 2, seed=0)
    fillers = 0
    with updates(data, plan) as stream:
        for step, groups in itertools.islice(stream, 2 * plan.updates_per_epoch):
            assert len(groups) == len(plan.update(step))
            for (batch, group), planned in zip(groups, plan.update(step), strict=True):
                np.testing.assert_array_equal(group.rows, planned.rows)
                check(data, shapes, batch, group.rows, group.shape)
                fillers += int((batch.weights == 0).sum())
    assert fillers == 2 * (-CLIPS % 4)


def test_a_cached_batch_is_the_same_but_for_its_audio(data, shapes, tmp_path):
    """Fillers too: a length of theirs would count frames that nobody spoke."""
    kept = features.Features(tmp_path, data.samples, lambda n: (n - 80) // 320, 3, np.float32)
    rng = np.random.default_rng(0)
    frames = [rng.random((kept.length(row), 3), np.float32) for row in range(CLIPS)]
    for number, rows in kept.missing():
        kept.write(number, [frames[row] for row in rows])
    kept.open()
    rows = np.array([4, -1, 11, -1])
    batch = assemble(data, rows, shapes[-1], 16)
    cached = loader.assemble_cached(data, kept, rows, shapes[-1], 16)
    for name in loader.CachedBatch._fields[1:]:
        found, expected = getattr(cached, name), getattr(batch, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected, err_msg=name)
    assert not cached.hidden_state[rows < 0].any()
    for place, row in ((0, 4), (2, 11)):
        np.testing.assert_array_equal(cached.hidden_state[place, : len(frames[row])], frames[row])
        assert not cached.hidden_state[place, len(frames[row]) :].any()


def test_evaluation_gives_every_row_once_and_ends(data, shapes):
    plan = EvalPlan(data.samples, shapes, 4)
    with evaluation(data, plan) as stream:
        found = list(stream)
    for batch, group in found:
        check(data, shapes, batch, group.rows, group.shape)
    rows = np.concatenate([group.rows for _, group in found])
    assert sorted(rows[rows >= 0]) == list(range(CLIPS))
    assert sum(batch.weights.sum() for batch, _ in found) == CLIPS


def test_label_width_depends_on_the_shape_alone(data, shapes):
    widths = label_widths(data, shapes)
    assert all(width % 8 == 0 for width in widths)
    assert list(widths) == sorted(widths)
    assert widths[-1] == -(-data.label_lengths.max() // 8) * 8
    for seed in range(20):  # left-overs move up, so any smaller row may come
        plan = TrainPlan(data.samples, shapes, 4, 1, seed)
        for step in range(plan.updates_per_epoch):
            (group,) = plan.update(step)
            rows = group.rows[group.rows >= 0]
            assert data.label_lengths[rows].max() <= widths[group.shape]


def test_label_width_covers_rows_that_move_up_from_smaller_shapes(data, monkeypatch):
    talkative_first = dataclasses.replace(
        data,
        samples=np.resize(np.array([5000, 10_000, 15_000], np.int32), len(data)),
        label_lengths=np.resize(np.array([20, 3, 9], np.int32), len(data)),
    )
    assert label_widths(talkative_first, (5200, 10_320, 15_440)) == (24, 24, 24)
    monkeypatch.setattr("flax_asr.data.loader.LABEL_MULTIPLE", 1)
    assert label_widths(talkative_first, (10_320, 15_440)) == (20, 20)


def test_label_width_covers_rows_that_speed_moves_into_smaller_shapes(data):
    talkative_second = dataclasses.replace(
        data,
        samples=np.resize(np.array([5000, 10_000, 15_000], np.int32), len(data)),
        label_lengths=np.resize(np.array([3, 20, 9], np.int32), len(data)),
    )
    shapes = (5200, 10_320, 15_440)
    assert label_widths(talkative_second, shapes) == (8, 24, 24)
    assert label_widths(talkative_second, shapes, fastest=2.0) == (24, 24, 24)


def test_hosts_share_each_group_between_them(data, shapes):
    plan = TrainPlan(data.samples, shapes, 4, 2, seed=0)
    with (
        updates(data, plan) as one,
        updates(data, plan, host_index=0, host_count=2) as first,
        updates(data, plan, host_index=1, host_count=2) as second,
    ):
        for _ in range(6):
            (_, whole), (_, left), (_, right) = next(one), next(first), next(second)
            for (batch, group), (low, low_group), (high, _) in zip(whole, left, right, strict=True):
                np.testing.assert_array_equal(group.rows, low_group.rows)
                for ours, part_0, part_1 in zip(batch, low, high, strict=True):
                    np.testing.assert_array_equal(ours, np.concatenate([part_0, part_1]))
    with pytest.raises(errors.DataError, match="4 rows does not divide by 3 hosts"):
        updates(data, plan, host_count=3)


def test_the_state_is_the_step_number(data, shapes):
    plan = TrainPlan(data.samples, shapes, 4, 2, seed=5)
    with updates(data, plan) as stream:
        _, late = next(itertools.islice(stream, 17, None))
    resumed = TrainPlan(data.samples, shapes, 4, 2, seed=5)
    with updates(data, resumed, start_step=17) as stream:
        step, again = next(stream)
    assert step == 17
    for (batch, _), (same, _) in zip(late, again, strict=True):
        for ours, theirs in zip(batch, same, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("start", [0, 10, 10_000])
def test_wherever_it_starts_only_the_rows_of_these_updates_are_read(
    data, shapes, start, monkeypatch
):
    read, hear = [], type(data).recordings
    monkeypatch.setattr(
        type(data), "recordings", lambda data, rows: (read.extend(rows), hear(data, rows))[1]
    )
    plan = TrainPlan(data.samples, shapes, 4, 2, seed=5)
    expected = [
        row
        for step in range(start, start + 3)
        for group in plan.update(step)
        for row in group.rows.tolist()
        if row >= 0
    ]
    assert read == []
    with updates(data, plan, start_step=start) as stream:
        assert [next(stream)[0] for _ in range(3)] == [start, start + 1, start + 2]
        assert read[: len(expected)] == expected


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_the_thread_ends_with_its_consumer(data, shapes):
    plan = TrainPlan(data.samples, shapes, 4, 2, seed=0)
    stream = updates(data, plan)
    next(stream)
    stream.close()
    assert loader_threads() == []
    with pytest.raises(StopIteration):
        next(stream)
    forgotten = updates(data, plan)
    next(forgotten)
    del forgotten
    gc.collect()
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert loader_threads() == []


def test_an_error_of_the_thread_reaches_the_consumer():
    def items():
        yield 1
        raise errors.DataError("the disk is gone")

    with Prefetched(items(), 2) as stream:
        assert next(stream) == 1
        with pytest.raises(errors.DataError, match="the disk is gone"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


def test_at_most_so_many_items_are_made_ahead():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    with Prefetched(items(), 3) as stream:
        time.sleep(0.4)
        assert len(made) == 4  # three in the queue, one in hand
        assert next(stream) == 0


def test_waiting_is_measured():
    def items():
        for i in range(3):
            time.sleep(0.1)
            yield i

    with Prefetched(items(), 1) as stream:
        assert list(stream) == [0, 1, 2]
        assert 0.2 < stream.wait_seconds < 2.0
    with Prefetched(iter(range(3)), 3) as stream:
        time.sleep(0.2)
        assert list(stream) == [0, 1, 2]
        assert stream.wait_seconds < 0.1


def test_labels_that_do_not_fit_are_refused(data):
    rows = np.array([int(data.label_lengths.argmax())])
    width = int(data.label_lengths.max())
    assert assemble(data, rows, 40_000, width).labels.tolist() == [data.labels(rows[0]).tolist()]
    with pytest.raises(ValueError, match="more than the width"):
        assemble(data, rows, 40_000, width - 1)
