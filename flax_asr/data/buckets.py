"""The batch plan: which rows form which group, in which static shape, at which update. Pure.

A *group* is `group_rows` rows that share one padded length; it is the batch that the devices get.
Rows of one bucket are chunked into groups; rows left over move up into the first group of the next
larger bucket, so that an epoch has `ceil(clips / group_rows)` groups and every row is in exactly
one of them. Several random groups make an update.

Everything here is a function of lengths, seed and step: nothing is stored, nothing depends on the
number of hosts or devices.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from flax_asr import errors

FRAME_MULTIPLE = 16
_NEVER = np.int64(2**61)


class Group(NamedTuple):
    """Rows that are computed together, at the padded length `shapes[shape]`."""

    shape: int
    rows: Int32[np.ndarray, " group_rows"]
    """Row numbers of the examples; -1 is a filler row, which is ignored."""
    epoch: int = 0
    """The pass over the examples that the group belongs to."""


def smallest_samples(
    frames: int,
    kernels: Sequence[int] = (10, 3, 3, 3, 3, 2, 2),
    strides: Sequence[int] = (5, 2, 2, 2, 2, 2, 2),
) -> int:
    """The fewest samples that give `frames` frames in unpadded convolutions.

    The defaults are those of wav2vec 2.0: 320 * frames + 80.

    Source: inverse of `floor((n - kernel) / stride) + 1`, applied from the last layer to the first.
    """
    samples = frames
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def choose_shapes(
    samples: Int[np.ndarray, " clips"],
    num_buckets: int,
    *,
    frame_samples: Callable[[int], int] = smallest_samples,
) -> tuple[int, ...]:
    """At most `num_buckets` padded lengths, ascending, with the least padding.

    Each is the fewest samples that give a multiple of 16 frames; the largest one covers the longest
    clip. The optimum is exact: a bucket's cost depends only on its own two edges, so dynamic
    programming over edges applies. Rows that move up to fill groups are not counted, as their
    number depends on the devices, and a run keeps its shapes on others.

    Args:
        samples: length of every clip.
        num_buckets: the most shapes allowed.
        frame_samples: gives the fewest samples for a number of frames.

    Raises:
        errors.DataError: there are no clips.
    """
    if len(samples) == 0:
        raise errors.DataError("There are no clips to choose batch shapes for.")
    candidates = _candidates(int(samples.max()), frame_samples)
    clips_up_to = np.cumsum(
        np.bincount(np.searchsorted(candidates, samples), minlength=len(candidates))
    )

    # cost[j]: the least cost of all clips up to candidate j, with the last edge at j.
    cost = candidates * clips_up_to
    previous_edges = []
    best = (cost[-1], 0)
    for bucket in range(1, min(num_buckets, len(candidates))):
        # through[i, j]: the same with the edge before j at i < j.
        through = cost[:, None] + candidates * (clips_up_to[None, :] - clips_up_to[:, None])
        through[np.tril_indices(len(candidates))] = _NEVER
        previous = through.argmin(axis=0)
        cost = through[previous, np.arange(len(candidates))]
        previous_edges.append(previous)
        best = min(best, (cost[-1], bucket))

    edge = len(candidates) - 1
    edges = [edge]
    for previous in reversed(previous_edges[: best[1]]):
        edge = int(previous[edge])
        edges.append(edge)
    return tuple(int(candidates[edge]) for edge in reversed(edges))


def _candidates(
    longest: int, frame_samples: Callable[[int], int]
) -> Int[np.ndarray, " candidates"]:
    lengths = [frame_samples(FRAME_MULTIPLE)]
    while lengths[-1] < longest:
        lengths.append(frame_samples(FRAME_MULTIPLE * (len(lengths) + 1)))
    return np.array(lengths, np.int64)


def row_shapes(
    samples: Int[np.ndarray, " rows"], shapes: Sequence[int]
) -> Int[np.ndarray, " rows"]:
    """Index of the smallest shape that holds each row.

    Raises:
        errors.DataError: a clip is longer than the largest shape, or the shapes do not ascend.
    """
    if any(low >= high for low, high in itertools.pairwise(shapes)):
        raise errors.DataError(f"Batch shapes must ascend; these are {tuple(shapes)}.")
    if len(samples) and samples.max() > shapes[-1]:
        raise errors.DataError(
            f"A clip of {samples.max()} samples is longer than the largest batch shape,"
            f" {shapes[-1]} samples: lower data.max_seconds or choose the shapes from these clips."
        )
    return np.searchsorted(np.asarray(shapes), samples)


def updates_per_epoch(clips: int, group_rows: int, groups_per_update: int, leaks: bool) -> int:
    """Updates of one pass over the clips; see `TrainPlan`."""
    if leaks:
        return max(1, -(-clips // group_rows) // groups_per_update)
    return -(-clips // (group_rows * groups_per_update))


def _groups(
    order: Int[np.ndarray, " rows"], row_shape: Int[np.ndarray, " rows"], group_rows: int
) -> tuple[Int32[np.ndarray, "groups group_rows"], Int[np.ndarray, " groups"]]:
    """Chunks rows, already sorted by shape, into groups; returns their rows and their shapes."""
    count = -(-len(order) // group_rows)
    rows = np.full(count * group_rows, -1, np.int32)
    rows[: len(order)] = order
    last = np.minimum(np.arange(1, count + 1) * group_rows, len(order)) - 1
    return rows.reshape(count, group_rows), row_shape[order[last]]


def _padding(
    samples: Int[np.ndarray, " rows"],
    shapes: Sequence[int],
    group_shapes: Int[np.ndarray, " groups"],
    group_rows: int,
) -> float:
    padded = int(np.asarray(shapes, np.int64)[group_shapes].sum()) * group_rows
    return 1.0 - int(samples.sum(dtype=np.int64)) / padded


class TrainPlan:
    """Every row once an epoch, in random groups of one bucket, several groups to an update.

    An epoch has exactly `ceil(rows / (group_rows * groups_per_update))` updates; the last of them
    may have fewer groups, and one group of the epoch may have filler rows. The plan of an epoch is
    computed when a step in it is needed, so starting at any step costs the same.

    With `leaks` the plan is that of the Hugging Face Trainer 4.17: only full updates count, groups
    left over at the end of an epoch join the first update of the next one, and every group has the
    same weight however many clips it has.

    Args:
        samples: length of every row.
        shapes: padded lengths, ascending, as from `choose_shapes`.
        group_rows: rows in a group: devices times rows on each.
        groups_per_update: groups whose gradients make one update.
        seed: the seed of the order of every epoch; not negative.
        leaks: whether groups left over at the end of an epoch join the next.
        lengths: gives the length of every row in an epoch, if augmentation changes it.

    Raises:
        errors.DataError: there are no rows, or a row is longer than the largest shape.
    """

    def __init__(
        self,
        samples: Int[np.ndarray, " rows"],
        shapes: Sequence[int],
        group_rows: int,
        groups_per_update: int,
        seed: int,
        leaks: bool = False,
        lengths: Callable[[int], Int[np.ndarray, " rows"]] | None = None,
    ) -> None:
        if len(samples) == 0:
            raise errors.DataError("There are no clips to train on.")
        self.samples = samples
        self.shapes = tuple(shapes)
        self.group_rows = group_rows
        self.groups_per_update = groups_per_update
        self.seed = seed
        self.leaks = leaks
        self._row_shape = row_shapes(samples, shapes)
        # Needed at every update, and expensive for a large corpus.
        self._lengths = None if lengths is None else functools.lru_cache(maxsize=2)(lengths)
        self._epoch: tuple[int, list[Group]] | None = None

    @property
    def updates_per_epoch(self) -> int:
        """Updates of a pass over all rows; with `leaks`, without those left over."""
        return updates_per_epoch(
            len(self.samples), self.group_rows, self.groups_per_update, self.leaks
        )

    def epoch(self, step: int) -> float:
        """Passes over the rows after `step` updates.

        With `leaks` an epoch does not end with its last update: left-over groups count with the
        first update of the next epoch.

        Source: transformers 4.17, `Trainer.train`, epoch + (i + 1) / micro-batches.
        """
        if not self.leaks or step == 0:
            return step / self.updates_per_epoch
        epoch, update = divmod(step - 1, self.updates_per_epoch)
        groups = -(-len(self.samples) // self.group_rows)
        return epoch + min((update + 1) * self.groups_per_update, groups) / groups

    def row_weight(self, group: Group) -> float:
        """The weight of each clip in the group."""
        return self.group_rows / int((group.rows >= 0).sum()) if self.leaks else 1.0

    @property
    def padding(self) -> float:
        """Fraction of an epoch's samples that are padding or filler; the same in every epoch.

        It is computed without augmentation.
        """
        order = np.argsort(self._row_shape, kind="stable")
        _, group_shapes = _groups(order, self._row_shape, self.group_rows)
        return _padding(self.samples, self.shapes, group_shapes, self.group_rows)

    def lengths(self, epoch: int) -> Int[np.ndarray, " rows"]:
        """Samples of every row in an epoch."""
        return self.samples if self._lengths is None else self._lengths(epoch)

    def update(self, step: int) -> tuple[Group, ...]:
        """The groups of update `step`, counted from 0 over all epochs."""
        epoch, update = divmod(step, self.updates_per_epoch)
        first = update * self.groups_per_update
        left_over = []
        if self.leaks and update == 0 and epoch > 0:
            whole = self.updates_per_epoch * self.groups_per_update
            left_over = self._epoch_groups(epoch - 1)[whole:]
        return (*left_over, *self._epoch_groups(epoch)[first : first + self.groups_per_update])

    def _epoch_groups(self, epoch: int) -> list[Group]:
        kept = self._epoch  # read once: two threads may call this
        if kept is not None and kept[0] == epoch:
            return kept[1]
        # Ranks of raw bits, because numpy promises to keep a bit generator's stream over versions
        # but not Generator.permutation's: a resumed run must see the same plan after an upgrade.
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
        shuffled = np.argsort(bits.random_raw(len(self.samples)), kind="stable")
        row_shape = self._row_shape
        if self._lengths is not None:
            row_shape = row_shapes(self.lengths(epoch), self.shapes)
        order = shuffled[np.argsort(row_shape[shuffled], kind="stable")]
        rows, group_shapes = _groups(order, row_shape, self.group_rows)
        mixed = np.argsort(bits.random_raw(len(rows)), kind="stable")
        groups = [Group(int(group_shapes[i]), rows[i], epoch) for i in mixed]
        self._epoch = (epoch, groups)
        return groups


class EvalPlan:
    """Every row once, in order of length; iterates over groups, the last one filled with -1.

    Args:
        samples: length of every row; may be empty.
        shapes: padded lengths, ascending, as from `choose_shapes`.
        group_rows: rows in a group: devices times rows on each.

    Raises:
        errors.DataError: a row is longer than the largest shape.
    """

    def __init__(
        self, samples: Int[np.ndarray, " rows"], shapes: Sequence[int], group_rows: int
    ) -> None:
        self.samples = samples
        self.shapes = tuple(shapes)
        self.group_rows = group_rows
        order = np.argsort(samples, kind="stable")
        self._rows, self._group_shapes = _groups(order, row_shapes(samples, shapes), group_rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Group]:
        for rows, shape in zip(self._rows, self._group_shapes, strict=True):
            yield Group(int(shape), rows)

    @property
    def padding(self) -> float:
        """Fraction of all samples that are padding or filler."""
        return _padding(self.samples, self.shapes, self._group_shapes, self.group_rows)


class InOrder:
    """Every row once, in the order of the corpus, with short and long clips in one batch.

    transformers' run_speech_recognition_ctc.py of 2022 did the same, so `evaluate.score` with
    `padded` needs it for the same error rates.
    """

    def __init__(
        self, samples: Int[np.ndarray, " rows"], shapes: Sequence[int], group_rows: int
    ) -> None:
        self.shapes = tuple(shapes)
        self.group_rows = group_rows
        self._row_shapes = row_shapes(samples, shapes)

    def __iter__(self) -> Iterator[Group]:
        for start in range(0, len(self._row_shapes), self.group_rows):
            end = min(start + self.group_rows, len(self._row_shapes))
            rows = np.full(self.group_rows, -1, np.int32)
            rows[: end - start] = np.arange(start, end)
            yield Group(int(self._row_shapes[start:end].max()), rows)
