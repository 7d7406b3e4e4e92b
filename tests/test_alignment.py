"""Frame arithmetic against enumeration of every path."""

import itertools

import numpy as np
import pytest

from flax_asr import alignment


def spelled(path, blank):
    return [symbol for symbol, _ in itertools.groupby(path) if symbol != blank]


@pytest.mark.parametrize("blank", [0, 1, 2])
def test_greedy_collapse_merges_repeats_and_then_drops_blanks(blank):
    for frames in range(6):
        for path in itertools.product(range(3), repeat=frames):
            collapsed = alignment.greedy_collapse(np.array(path, np.int32), blank)
            assert collapsed == spelled(path, blank)
            assert all(type(symbol) is int for symbol in collapsed)


def test_min_frames_is_the_length_of_the_shortest_path_that_spells_the_labels():
    shortest = {}
    for frames in range(8):
        for path in itertools.product(range(3), repeat=frames):
            shortest.setdefault(tuple(spelled(path, 0)), frames)
    for labels, frames in shortest.items():
        assert alignment.min_frames(np.array(labels, np.int32)) == frames
        assert alignment.min_frames(list(labels)) == frames


def test_the_limits_of_a_label_do_not_matter_to_min_frames():
    assert alignment.min_frames(np.array([], np.int32)) == 0
    assert alignment.min_frames([7]) == 1
    assert alignment.min_frames([7] * 5) == 9


def runs(path, blank):
    """First and past-the-last frame of each label that a path spells."""
    spans, start = [], 0
    for symbol, group in itertools.groupby(path):
        stop = start + len(list(group))
        if symbol != blank:
            spans.append([start, stop])
        start = stop
    return spans


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("target", [[], [1], [1, 1], [1, 1, 1]])
@pytest.mark.parametrize("seed", range(3))
def test_align_finds_the_best_of_all_paths(seed, target, blank):
    rng = np.random.default_rng(seed)
    frames = 6
    log_probs = 2 * rng.standard_normal((frames, 3))
    other = 2 - blank
    for labels in {(*target,), (other, *target), (*target, other)}:
        paths = [
            path
            for path in itertools.product(range(3), repeat=frames)
            if spelled(path, blank) == list(labels)
        ]
        if not paths:
            with pytest.raises(ValueError, match="no path of 6 frames spells these"):
                alignment.align(log_probs, np.array(labels, int), blank)
            continue
        best = max(paths, key=lambda path: log_probs[np.arange(frames), path].sum())
        spans = alignment.align(log_probs, np.array(labels, int), blank)
        assert spans.shape == (len(labels), 2)
        assert spans.tolist() == runs(best, blank)


def test_align_does_not_use_a_forbidden_symbol():
    log_probs = np.zeros((4, 3), np.float32)
    log_probs[:, 0] = -np.inf
    log_probs[2:, 1] = -np.inf
    log_probs[:2, 2] = -np.inf
    assert alignment.align(log_probs, [1, 2], 0).tolist() == [[0, 2], [2, 4]]
    log_probs[2:, 2] = -np.inf
    with pytest.raises(ValueError, match="no path"):
        alignment.align(log_probs, [1, 2], 0)


@pytest.mark.parametrize("label", [-1, 0, 3])
def test_align_refuses_labels_that_no_frame_can_emit(label):
    with pytest.raises(ValueError, match=r"labels must lie in 0..2 and differ from the blank 0"):
        alignment.align(np.zeros((4, 3)), [1, label], 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_align_refuses_scores_that_are_not_numbers(bad):
    log_probs = np.zeros((4, 3))
    log_probs[1] = bad
    with pytest.raises(ValueError, match=r"must not be NaN or \+inf"):
        alignment.align(log_probs, [1, 2], 0)
