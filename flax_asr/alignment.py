"""CTC paths of one clip: the labels that a path spells, and the most probable path of labels.

Numpy only, so that data preparation can use it without jax.

Source: Graves et al. 2006, "Connectionist temporal classification", section 3 (the map B, which
merges repeats and then drops blanks).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def greedy_collapse(ids: Int[np.ndarray, " frames"], blank: int) -> list[int]:
    """The labels that a path (one id per frame) spells: repeats merged, then blanks dropped.

    Args:
        ids: the id chosen at each real frame; leave padding frames out.
        blank: id of the blank.
    """
    ids = np.asarray(ids)
    starts_run = np.ones(ids.shape, bool)
    starts_run[1:] = ids[1:] != ids[:-1]
    return ids[starts_run & (ids != blank)].tolist()


def min_frames(labels: Int[np.ndarray, " tokens"] | Sequence[int]) -> int:
    """Fewest frames that can spell `labels`: one each, and a blank between equal neighbours."""
    labels = np.asarray(labels)
    return int(labels.size + np.count_nonzero(labels[1:] == labels[:-1]))


def align(
    log_probs: Float[np.ndarray, "frames vocab"],
    labels: Int[np.ndarray, " tokens"] | Sequence[int],
    blank: int,
) -> Int[np.ndarray, "tokens 2"]:
    """Frames that each label takes on the most probable path: [first, past the last).

    Frames of the path between two spans are blanks. Among equally good paths the choice is
    deterministic.

    Args:
        log_probs: log-probabilities (nats) of the real frames of one clip; logits work too,
            since a constant added to a frame changes no comparison. -inf forbids a symbol.
        labels: the transcript, without blanks.
        blank: id of the blank.

    Raises:
        ValueError: no path of nonzero probability spells the labels (too few frames, a forbidden
            symbol), a label is the blank or outside the vocabulary, or a score is NaN or +inf.
    """
    labels = np.asarray(labels, np.int64)
    frames, vocab = log_probs.shape
    if np.any((labels < 0) | (labels >= vocab) | (labels == blank)):
        raise ValueError(f"labels must lie in 0..{vocab - 1} and differ from the blank {blank}")

    if not np.all(log_probs < np.inf):
        raise ValueError("log_probs must not be NaN or +inf")

    # States in Graves's order: blank, label 0, blank, label 1, ..., blank.
    states = np.full(2 * labels.size + 1, blank)
    states[1::2] = labels
    may_skip = np.zeros(states.size, bool)
    may_skip[3::2] = labels[1:] != labels[:-1]

    scores = np.full(states.size, -np.inf)
    scores[0] = 0.0  # the blank before the first frame
    moves = np.zeros((frames, states.size), np.int8)
    for frame in range(frames):
        came_from = np.full((3, states.size), -np.inf)
        came_from[0] = scores
        came_from[1, 1:] = scores[:-1]
        came_from[2, 2:] = np.where(may_skip[2:], scores[:-2], -np.inf)
        moves[frame] = came_from.argmax(axis=0)
        scores = came_from.max(axis=0) + log_probs[frame, states]

    state = states.size - 1
    if labels.size and scores[-2] > scores[-1]:
        state -= 1
    if scores[state] == -np.inf:
        raise ValueError(
            f"no path of {frames} frames spells these {labels.size} labels "
            f"(they take at least {min_frames(labels)} frames, more where -inf forbids a symbol)"
        )
    path = np.empty(frames, np.int64)
    for frame in reversed(range(frames)):
        path[frame] = state
        state -= moves[frame, state]
    of_label = 2 * np.arange(labels.size) + 1
    return np.stack(
        [np.searchsorted(path, of_label), np.searchsorted(path, of_label, side="right")], axis=1
    )
