"""A process of the pool: starting it, and its main loop.

It is a new Python process, never a fork (forking a process with jax's threads may deadlock). It
imports the function's module, and not the running script.
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
    # glibc's allocator returns the memory of every large array to the system, and gets it back page
    # by page, unless told to keep it.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**26),
}


class Failure(NamedTuple):
    """The result of a task that failed.

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

    Through the socket it first sends None when it is ready, then a list of results for every list
    of tasks, in order (`messages`). It ends with the connection.
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
    """The main loop of a process: takes tasks and sends results until the connection ends."""
    link = socket.socket(fileno=descriptor)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        function = messages.receive(link)
        batches: queue.SimpleQueue = queue.SimpleQueue()
        # A thread receives tasks, as both sides could otherwise block with full buffers.
        threading.Thread(target=_take_in, args=(link, batches), daemon=True).start()
        messages.send(link, None)
        while True:
            messages.send(link, [_result(function, task) for task in batches.get()])


def _result(function: Callable[[Any], Any], task: Any) -> Any:
    try:
        return function(task)
    except Exception as error:  # any failure of a task is its result
        return Failure("failed", f"{type(error).__name__}: {error}")


def _take_in(link: socket.socket, batches: queue.SimpleQueue) -> None:
    while True:
        try:
            batches.put(messages.receive(link))
        except (EOFError, OSError):
            os._exit(0)  # the parent is gone, and the main thread may hang
