"""numpy batches for this host, straight from the memory maps, assembled ahead by one thread.

The loader's whole state is the step number: the plan says which rows form a batch, the examples
hold their content.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32, Int, Int16, Int32, Shaped

from flax_asr import errors
from flax_asr.data import augment, buckets, examples, features

LABEL_MULTIPLE = 8
_Item = TypeVar("_Item")


class Batch(NamedTuple):
    """This host's rows of a group; a filler row has length and weight 0.

    The audio is int16, to be multiplied by `gains`; in transcription it is the decoder's float32.
    """

    audio: Int16[np.ndarray, "rows samples"] | Float32[np.ndarray, "rows samples"]
    gains: Float32[np.ndarray, " rows"]
    sample_lengths: Int32[np.ndarray, " rows"]
    labels: Int32[np.ndarray, "rows tokens"]
    label_lengths: Int32[np.ndarray, " rows"]
    weights: Float32[np.ndarray, " rows"]


class CachedBatch(NamedTuple):
    """A `Batch` with the frozen layers' output in place of audio; zeros past a clip's end."""

    hidden_state: Shaped[np.ndarray, "rows frames hidden"]
    sample_lengths: Int32[np.ndarray, " rows"]
    labels: Int32[np.ndarray, "rows tokens"]
    label_lengths: Int32[np.ndarray, " rows"]
    weights: Float32[np.ndarray, " rows"]


Planned = tuple[Batch | CachedBatch, buckets.Group]
"""This host's rows of a group, and the group."""


def label_widths(
    data: examples.Examples,
    shapes: Sequence[int],
    fastest: float = 1.0,
) -> tuple[int, ...]:
    """Number of tokens to which labels are padded in each shape; fixed, so that each compiles once.

    It is the longest label of any row that can be in the shape (rows may move up from smaller
    shapes), rounded up to a multiple of `LABEL_MULTIPLE`. Augmentation shortens rows by a factor of
    at most `fastest`, so they can be in smaller shapes too.
    """
    longest = np.zeros(len(shapes), np.int64)
    shortest = np.floor(data.samples / fastest).astype(np.int32)
    np.maximum.at(longest, buckets.row_shapes(shortest, shapes), data.label_lengths)
    longest = np.maximum.accumulate(np.maximum(longest, 1))
    return tuple((-(-longest // LABEL_MULTIPLE) * LABEL_MULTIPLE).tolist())


def assemble(
    data: examples.Examples,
    rows: Int[np.ndarray, " rows"],
    samples: int,
    tokens: int,
    heard: Sequence[augment.Clip] | None = None,
) -> Batch:
    """One batch: `rows` of the examples (-1 = filler) padded to `samples` and `tokens`.

    `heard` takes the place of the examples' own recordings: one clip for each real row.
    """
    real = rows >= 0
    found = np.where(real, rows, 0)
    lengths, gains = data.samples[found], data.gains[found]
    if heard is None:
        recordings = data.recordings(rows[real])
    else:
        recordings = [clip for clip, _ in heard]
        lengths[real] = [len(clip) for clip in recordings]
        gains[real] = [gain for _, gain in heard]
    # Fresh arrays each time: the device may read them long after the next batch is assembled.
    audio = np.empty((len(rows), samples), np.int16)
    sample_lengths = np.where(real, lengths, np.int32(0))
    label_lengths = np.where(real, data.label_lengths[found], np.int32(0))
    for place, recording in zip(np.flatnonzero(real).tolist(), recordings, strict=True):
        audio[place, : len(recording)] = recording
        audio[place, len(recording) :] = 0
    audio[~real] = 0
    return Batch(
        audio=audio,
        gains=np.where(real, gains, np.float32(1)),
        sample_lengths=sample_lengths,
        labels=data.padded_labels(found, label_lengths, tokens),
        label_lengths=label_lengths,
        weights=real.astype(np.float32),
    )


def assemble_cached(
    data: examples.Examples,
    kept: features.Features,
    rows: Int[np.ndarray, " rows"],
    samples: int,
    tokens: int,
) -> CachedBatch:
    """As `assemble`, with the cached features of the rows in place of audio."""
    real = rows >= 0
    found = np.where(real, rows, 0)
    label_lengths = np.where(real, data.label_lengths[found], np.int32(0))
    return CachedBatch(
        hidden_state=kept.padded(rows, samples),
        sample_lengths=np.where(real, data.samples[found], np.int32(0)),
        labels=data.padded_labels(found, label_lengths, tokens),
        label_lengths=label_lengths,
        weights=real.astype(np.float32),
    )


class Prefetched(Generic[_Item]):
    """An iterator whose items a thread produces ahead, at most `depth` of them.

    An error in the thread is raised in place of its item. Close the iterator (or use it in a `with`
    statement) to stop early; one that is not closed stops its thread when garbage-collected.

    Attributes:
        wait_seconds: time that the consumer has waited for items so far.
    """

    def __init__(self, items: Iterator[_Item], depth: int) -> None:
        self.wait_seconds = 0.0
        self._stop = threading.Event()
        self._queue: queue.Queue = queue.Queue(max(depth, 1))
        # The thread must not know `self`, or a forgotten iterator would never be collected.
        self._thread = threading.Thread(
            target=_produce, args=(items, self._queue, self._stop), name="loader", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> "Prefetched[_Item]":
        return self

    def __next__(self) -> _Item:
        if self._stop.is_set():
            raise StopIteration
        start = time.perf_counter()
        item, error = self._queue.get()
        self.wait_seconds += time.perf_counter() - start
        if error is not None:
            self.close()
            raise error
        return item

    def close(self) -> None:
        """Stops the thread and waits for it."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> "Prefetched[_Item]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._stop.set()


def _produce(items: Iterator[_Item], out: queue.Queue, stop: threading.Event) -> None:
    try:
        for item in items:
            if not _put(out, (item, None), stop):
                return
        _put(out, (None, StopIteration()), stop)
    except Exception as error:  # of any kind: it is raised in the consumer
        _put(out, (None, error), stop)


def _put(out: queue.Queue, entry: tuple, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            out.put(entry, timeout=0.1)
            return True
        except queue.Full:
            pass
    return False


def updates(
    data: examples.Examples,
    plan: buckets.TrainPlan,
    start_step: int = 0,
    host_index: int = 0,
    host_count: int = 1,
    tokens: Sequence[int] | None = None,
    augmentation: augment.Augmentation | None = None,
    kept: features.Features | None = None,
) -> Prefetched[tuple[int, list[Planned]]]:
    """Endless `(step, [(batch, group), ...])` from `start_step` on, two updates ahead.

    Args:
        data: the training examples.
        plan: which rows form which group.
        start_step: the index of the first update.
        host_index, host_count: a batch holds the `host_index`-th of `host_count` equal parts of
            its group's rows.
        tokens: width of the labels in each shape, where several sets share them; by default
            `label_widths` of these examples.
        augmentation: the augmentation whose lengths the plan was made for.
        kept: the frozen layers' output, which takes the place of audio.

    Raises:
        errors.DataError: the group does not divide by the hosts.
    """
    share = _Share(data, plan, tokens, host_index, host_count, augmentation, kept)

    def produce() -> Iterator[tuple[int, list[Planned]]]:
        step = start_step
        while True:
            yield (
                step,
                [
                    (share.batch(group, plan.row_weight(group)), group)
                    for group in plan.update(step)
                ],
            )
            step += 1

    return Prefetched(produce(), depth=2)


def evaluation(
    data: examples.Examples,
    plan: buckets.EvalPlan | buckets.InOrder,
    host_index: int = 0,
    host_count: int = 1,
    tokens: Sequence[int] | None = None,
) -> Prefetched[tuple[Batch, buckets.Group]]:
    """Every group of the plan once, as `(batch, group)`, four groups ahead; see `updates`.

    Raises:
        errors.DataError: the group does not divide by the hosts.
    """
    share = _Share(data, plan, tokens, host_index, host_count)
    return Prefetched(((share.batch(group), group) for group in plan), depth=4)


class _Share:
    """A host's part of every group."""

    def __init__(
        self,
        data: examples.Examples,
        plan: buckets.TrainPlan | buckets.EvalPlan | buckets.InOrder,
        tokens: Sequence[int] | None,
        host_index: int,
        host_count: int,
        augmentation: augment.Augmentation | None = None,
        kept: features.Features | None = None,
    ) -> None:
        if plan.group_rows % host_count:
            raise errors.DataError(
                f"A group of {plan.group_rows} rows does not divide by {host_count} hosts: choose a"
                " per-device batch and a number of devices that each host has an equal part of."
            )
        rows = plan.group_rows // host_count
        self._data = data
        self._shapes = plan.shapes
        self._widths = label_widths(data, plan.shapes) if tokens is None else tokens
        self._rows = slice(host_index * rows, (host_index + 1) * rows)
        self._augmentation, self._kept = augmentation, kept

    def batch(self, group: buckets.Group, row_weight: float = 1.0) -> Batch | CachedBatch:
        samples, tokens = self._shapes[group.shape], self._widths[group.shape]
        rows = group.rows[self._rows]
        if self._kept is not None:
            batch = assemble_cached(self._data, self._kept, rows, samples, tokens)
        else:
            heard = None
            if self._augmentation is not None:
                heard = self._augmentation.clips(group.epoch, rows[rows >= 0].tolist())
            batch = assemble(self._data, rows, samples, tokens, heard)
        return batch._replace(weights=batch.weights * np.float32(row_weight))
