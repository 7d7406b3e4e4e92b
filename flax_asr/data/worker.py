"""One process of the pool: how it starts, and its life.

It is a Python of its own, never a fork (a fork of a process with jax's threads may deadlock), that
imports what the function's module imports and not the script that runs here.
"""

import contextlib
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from flax_asr.data import messages

# Ctrl-C is the parent's to handle.
_PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = {path!r};"
    " from flax_asr.data import worker; worker.live({descriptor})"
)

_ENVIRONMENT = {
    # Threads for linear algebra take longer to start than all the rest of numpy.
    "OPENBLAS_NUM_THREADS": "1",
    # Of glibc's allocator: memory goes back to the system with every array of a task, and comes
    # again page by page, unless told to stay.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**26),
}


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
) -> tuple[subprocess.Popen, socket.socket]:
    """Starts a process that computes `function` for each task of the batches sent to it.

    Through the socket it says once, with None, that it is ready; then it sends a list of results
    for every list of tasks, in their order (`messages`). It ends with the connection.
    """
    ours, theirs = socket.socketpair()
    with theirs:  # closed here, so that the end of the process ends the connection
        descriptor = theirs.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(path=sys.path, descriptor=descriptor)],
            stdin=subprocess.DEVNULL,
            pass_fds=[descriptor],
            env=_ENVIRONMENT | os.environ,
        )
    messages.send(ours, function)
    return process, ours


def live(descriptor: int) -> None:
    """The life of a process: take tasks, send results, until the connection ends."""
    link = socket.socket(fileno=descriptor)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        function = messages.receive(link)
        batches: queue.SimpleQueue = queue.SimpleQueue()
        # A thread takes tasks in, or both sides could wait for each other with full buffers.
        threading.Thread(target=_take_in, args=(link, batches), daemon=True).start()
        messages.send(link, None)
        while True:
            messages.send(link, [_result(function, task) for task in batches.get()])


def _result(function: Callable[[Any], Any], task: Any) -> Any:
    try:
        return function(task)
    except Exception as error:  # one task's failure is its result, whatever it is
        return Failure("failed", f"{type(error).__name__}: {error}")


def _take_in(link: socket.socket, batches: queue.SimpleQueue) -> None:
    while True:
        try:
            batches.put(messages.receive(link))
        except (EOFError, OSError):
            os._exit(0)  # the parent is gone, and the main thread may hang
