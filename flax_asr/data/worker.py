"""One process of the pool: how it starts, and its life.

It is a Python of its own, never a fork (a fork of a process with jax's threads may deadlock), that
imports what the function's module imports and not the script that runs here.
"""

import multiprocessing.connection
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

# Ctrl-C is the parent's to handle.
_PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = {path!r};"
    " from flax_asr.data import worker; worker.live({descriptor})"
)


class Failure(NamedTuple):
    """Stands for the result of a task that has none.

    Attributes:
        reason: "crashed" (its process died), "timeout", or "failed" (the function raised).
        detail: what was seen.
    """

    reason: str
    detail: str


def start(
    function: Callable[[Any], Any],
) -> tuple[subprocess.Popen, multiprocessing.connection.Connection]:
    """Starts a process that computes `function` for each task of the batches sent to it.

    Through the connection it says once, with None, that it is ready; then it sends a list of
    results for every list of tasks, in their order. It ends with the connection.
    """
    ours, theirs = multiprocessing.connection.Pipe()
    with theirs:  # closed here, so that the end of the process ends the connection
        descriptor = theirs.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(path=sys.path, descriptor=descriptor)],
            stdin=subprocess.DEVNULL,
            pass_fds=[descriptor],
            # Threads for linear algebra take longer to start than all the rest of numpy.
            env={"OPENBLAS_NUM_THREADS": "1", **os.environ},
        )
    ours.send(function)
    return process, ours


def live(descriptor: int) -> None:
    """The life of a process: take tasks, send results, until the connection ends."""
    connection = multiprocessing.connection.Connection(descriptor)
    function = connection.recv()
    batches: queue.SimpleQueue = queue.SimpleQueue()
    # A thread takes tasks in, or both sides could wait for each other with full pipes.
    threading.Thread(target=_take_in, args=(connection, batches), daemon=True).start()
    connection.send(None)
    while True:
        connection.send([_result(function, task) for task in batches.get()])


def _result(function: Callable[[Any], Any], task: Any) -> Any:
    try:
        return function(task)
    except Exception as error:  # one task's failure is its result, whatever it is
        return Failure("failed", f"{type(error).__name__}: {error}")


def _take_in(connection: multiprocessing.connection.Connection, batches: queue.SimpleQueue) -> None:
    while True:
        try:
            batches.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # the parent is gone, and the main thread may hang
