"""A process pool for work that may kill or hang its process: that costs one task, not the run.

Processes are spawned, never forked (a fork of a process with jax's threads may deadlock), and
import only what the function's module imports.
"""

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from flax_asr import errors

_TASKS_AHEAD = 2  # the next task is there when a process finishes one
_WINDOW_PER_WORKER = 8
_START_SECONDS = 120.0
_READY = -1


class Failure(NamedTuple):
    """Stands for the result of a task that has none.

    Attributes:
        reason: "crashed" (its process died), "timeout", or "failed" (the function raised).
        detail: what was seen.
    """

    reason: str
    detail: str


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
) -> Iterator[tuple[Any, Any]]:
    """Computes `function(task)` in `workers` processes; gives the results in order.

    Memory is bounded: at most 8 tasks a worker are between the source and the consumer. Processes
    start when there is work for them, and end with the iterator, used up or not.

    Args:
        function: of one task; importable by name.
        tasks: pairs of an item, which stays here, and its task, which must pickle; a task None is
            not computed, its result is None. May be lazy.
        workers: the most processes.
        limit_seconds: after so long with one task, its process is killed.

    Yields:
        Each item with the result of its task, or a `Failure`.

    Raises:
        errors.DataError: a process dies or hangs before it can take a task.
    """
    source = enumerate(tasks)
    exhausted = False
    order: collections.deque[tuple[int, Any]] = collections.deque()
    ready: collections.deque[tuple[int, Any]] = collections.deque()
    results: dict[int, Any] = {}
    pool: list[_Worker] = []
    try:
        while True:
            while True:
                if not ready and not exhausted and len(order) < workers * _WINDOW_PER_WORKER:
                    number, pair = next(source, (None, None))
                    exhausted = number is None
                    if not exhausted:
                        item, task = pair
                        order.append((number, item))
                        if task is None:
                            results[number] = None
                            continue
                        ready.append((number, task))
                worker = _with_room(pool, workers, function) if ready else None
                if worker is None:
                    break
                worker.give(*ready.popleft())
            while order and order[0][0] in results:
                number, item = order.popleft()
                yield item, results.pop(number)
            if order:
                for number, result in _next_results(pool, ready, limit_seconds):
                    results[number] = result
            elif exhausted:
                return
    finally:
        for worker in pool:
            worker.kill()


class _Worker:
    """One process, what it was given, and since when it has been at the first of that."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process ends the connection
        self.tasks: collections.deque[tuple[int, Any]] = collections.deque()
        self.is_ready = False
        self.since = time.monotonic()

    def give(self, number: int, task: Any) -> None:
        if self.is_ready and not self.tasks:
            self.since = time.monotonic()
        self.tasks.append((number, task))
        # If it is dead, the loop finds that out, with the reason, when it reads.
        with contextlib.suppress(OSError):
            self.connection.send((number, task))

    def deadline(self, limit_seconds: float) -> float:
        if not self.is_ready:
            return self.since + _START_SECONDS
        return self.since + limit_seconds if self.tasks else float("inf")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _with_room(pool: list[_Worker], workers: int, function: Callable[[Any], Any]) -> _Worker | None:
    idlest = min(pool, key=lambda worker: len(worker.tasks), default=None)
    if idlest is not None and not idlest.tasks:
        return idlest
    if len(pool) < workers:
        pool.append(_Worker(function))
        return pool[-1]
    return idlest if idlest is not None and len(idlest.tasks) < _TASKS_AHEAD else None


def _next_results(
    pool: list[_Worker], ready: collections.deque[tuple[int, Any]], limit_seconds: float
) -> Iterator[tuple[int, Any]]:
    """Waits for results; a worker that died or hangs is removed and its other tasks given back."""
    timeout_seconds = min(worker.deadline(limit_seconds) for worker in pool) - time.monotonic()
    connections = [worker.connection for worker in pool]
    readable = multiprocessing.connection.wait(connections, max(timeout_seconds, 0))
    for worker in list(pool):
        failure = None
        if worker.connection in readable:
            try:
                number, result = worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join()
                failure = Failure("crashed", f"exit code {worker.process.exitcode}")
            else:
                worker.since = time.monotonic()
                if number == _READY:
                    worker.is_ready = True
                else:
                    worker.tasks.popleft()
                    yield number, result
        elif time.monotonic() >= worker.deadline(limit_seconds):
            failure = Failure("timeout", f"more than {limit_seconds:g} s")
        if failure is not None:
            pool.remove(worker)
            worker.kill()
            if not worker.is_ready:
                raise errors.DataError(
                    f"Worker processes cannot start ({failure.reason}, {failure.detail}). If this"
                    ' is called from your own script, put it under `if __name__ == "__main__":`.'
                )
            if worker.tasks:
                number, _ = worker.tasks.popleft()
                ready.extendleft(reversed(worker.tasks))
                yield number, failure


def _work(
    connection: multiprocessing.connection.Connection, function: Callable[[Any], Any]
) -> None:
    """The life of a process: take tasks, send results, until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    tasks: queue.SimpleQueue = queue.SimpleQueue()
    # A thread takes tasks in, or both sides could wait for each other with full pipes.
    threading.Thread(target=_take_in, args=(connection, tasks), daemon=True).start()
    connection.send((_READY, None))
    while True:
        number, task = tasks.get()
        try:
            result = function(task)
        except Exception as error:  # one task's failure is its result, whatever it is
            result = Failure("failed", f"{type(error).__name__}: {error}")
        connection.send((number, result))


def _take_in(connection: multiprocessing.connection.Connection, tasks: queue.SimpleQueue) -> None:
    while True:
        try:
            tasks.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # the parent is gone, and the main thread may hang
