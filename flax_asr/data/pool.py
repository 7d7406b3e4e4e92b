"""A process pool for tasks that may kill or hang their process, which then costs only that task."""

import collections
import contextlib
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flax_asr import errors
from flax_asr.data import messages, worker

Failure = worker.Failure
_BATCHES_AHEAD = 2  # the next batch is there when a process finishes one
_WINDOW_PER_WORKER = 8
_START_SECONDS = 120.0


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_ordered(
    function: Callable[[Any], Any],
    tasks: Iterable[tuple[Any, Any]],
    *,
    workers: int,
    limit_seconds: float,
    batch: int = 1,
) -> Iterator[tuple[Any, Any]]:
    """Computes `function(task)` in `workers` processes; yields the results in order.

    Memory is bounded: at most 8 tasks for each worker are in flight. Processes start when there is
    work for them, and end with the iterator, exhausted or not.

    Args:
        function: computes one task; importable by name, and not from `__main__`.
        tasks: pairs of an item, which stays in this process, and its task, which must pickle; a
            task None is not computed and gives None. May be lazy.
        workers: the most processes.
        limit_seconds: time limit for a batch, after which its process is killed.
        batch: number of tasks handed over at once, at most 4, which is cheaper for short tasks. If
            the process of a batch dies or hangs, its tasks are retried one by one.

    Yields:
        Each item with the result of its task, or a `Failure`.

    Raises:
        errors.DataError: a process dies or hangs before it can take a task.
    """
    source = enumerate(tasks)
    exhausted = False
    order: collections.deque[tuple[int, Any]] = collections.deque()
    ready = _Ready(batch)
    results: dict[int, Any] = {}
    pool: list[_Worker] = []
    try:
        while True:
            while True:
                room = workers * _WINDOW_PER_WORKER
                while not exhausted and len(ready) < batch and len(order) < room:
                    number, pair = next(source, (None, None))
                    exhausted = number is None
                    if not exhausted:
                        item, task = pair
                        order.append((number, item))
                        if task is None:
                            results[number] = None
                        else:
                            ready.append(number, task)
                process = _with_room(pool, workers, function) if ready else None
                if process is None:
                    break
                process.give(ready.next_batch())
            while order and order[0][0] in results:
                number, item = order.popleft()
                yield item, results.pop(number)
            if order and pool:
                results.update(_next_results(pool, ready, limit_seconds))
            elif exhausted and not order:
                return
    finally:
        for process in pool:
            process.kill()


class _Ready:
    """Tasks waiting for a process, with their numbers, and how many are handed over at once."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._tasks: collections.deque[tuple[int, Any]] = collections.deque()
        self._alone: set[int] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def append(self, number: int, task: Any) -> None:
        self._tasks.append((number, task))

    def next_batch(self) -> list[tuple[int, Any]]:
        batch = [self._tasks.popleft()]
        if batch[0][0] not in self._alone:
            while self._tasks and len(batch) < self._batch:
                if self._tasks[0][0] in self._alone:
                    break
                batch.append(self._tasks.popleft())
        return batch

    def give_back(self, batches: Iterable[list[tuple[int, Any]]], *, alone: bool) -> None:
        """Puts batches back at the front, in order."""
        tasks = [task for batch in batches for task in batch]
        self._tasks.extendleft(reversed(tasks))
        if alone:
            self._alone.update(number for number, _ in tasks)


class _Worker:
    """One process, its batches, and the time since when it has been working on the first."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.process, self.link = worker.start(function)
        self.batches: collections.deque[list[tuple[int, Any]]] = collections.deque()
        self.is_ready = False
        self.since = time.monotonic()

    def give(self, batch: list[tuple[int, Any]]) -> None:
        if self.is_ready and not self.batches:
            self.since = time.monotonic()
        self.batches.append(batch)
        # If the process is dead, the loop finds out when it reads from it.
        with contextlib.suppress(OSError):
            messages.send(self.link, [task for _, task in batch])

    def deadline(self, limit_seconds: float) -> float:
        if not self.is_ready:
            return self.since + _START_SECONDS
        return self.since + limit_seconds if self.batches else float("inf")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.link.close()


def _with_room(pool: list[_Worker], workers: int, function: Callable[[Any], Any]) -> _Worker | None:
    idlest = min(pool, key=lambda process: len(process.batches), default=None)
    if idlest is not None and not idlest.batches:
        return idlest
    if len(pool) < workers:
        pool.append(_Worker(function))
        return pool[-1]
    return idlest if idlest is not None and len(idlest.batches) < _BATCHES_AHEAD else None


def _next_results(
    pool: list[_Worker], ready: _Ready, limit_seconds: float
) -> Iterator[tuple[int, Any]]:
    """Waits for results; removes a worker that died or hangs, and gives back its other tasks."""
    timeout_seconds = min(process.deadline(limit_seconds) for process in pool) - time.monotonic()
    links = [process.link for process in pool]
    readable = multiprocessing.connection.wait(links, max(timeout_seconds, 0))
    for process in list(pool):
        failure = None
        if process.link in readable:
            try:
                found = messages.receive(process.link)
            except (EOFError, OSError):
                failure = Failure("crashed", f"exit code {process.process.wait()}")
            else:
                process.since = time.monotonic()
                if process.is_ready:
                    batch = process.batches.popleft()
                    yield from ((n, result) for (n, _), result in zip(batch, found, strict=True))
                process.is_ready = True
        elif time.monotonic() >= process.deadline(limit_seconds):
            failure = Failure("timeout", f"more than {limit_seconds:g} s")
        if failure is not None:
            pool.remove(process)
            process.kill()
            if not process.is_ready:
                raise errors.DataError(
                    f"Worker processes cannot start ({failure.reason}, {failure.detail});"
                    " what they printed says why."
                )
            if process.batches:
                batch = process.batches.popleft()
                ready.give_back(process.batches, alone=False)
                if len(batch) > 1:
                    ready.give_back([batch], alone=True)
                else:
                    yield batch[0][0], failure
