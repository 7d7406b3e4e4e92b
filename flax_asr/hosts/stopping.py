"""Signals that stop a run: SIGTERM (preemption), SIGINT (Ctrl-C), SIGHUP (a closed terminal)."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STATUS = 75
"""Exit status EX_TEMPFAIL of sysexits.h: run again to resume."""


class Stop:
    """Handles these signals while a run owns the process.

    Outside `deferred` there is nothing to save, and the process ends at once: a compilation in
    another thread could not be interrupted otherwise. Inside, the signal is noted for the loop, and
    a second one ends the process; except SIGHUP, which a closed terminal causes twice, by the
    system and by the shell. If `nohup` has SIGHUP ignored, it stays ignored. Threads other than the
    main one cannot handle signals in Python: there the handlers are left as they are.

    Args:
        leave: ends the process with a status, after telling the other hosts why.

    Attributes:
        asked: whether a signal has come.
    """

    def __init__(self, leave: Callable[[int, str], None] | None = None) -> None:
        self.asked = False
        self._deferred = False
        self._leave = leave or (lambda status, message: os._exit(status))

    def __enter__(self) -> "Stop":
        asking = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            asking.append(signal.SIGHUP)
        if threading.current_thread() is not threading.main_thread():
            asking.clear()
        self._before = {number: signal.signal(number, self._note) for number in asking}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """For a loop that checks `asked`, and saves before it ends."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def obey(self) -> None:
        """Ends the process if a signal has come."""
        if self.asked:
            self._end("stopped. Run the same command to go on.")

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._deferred:
            self._end(f"{name}: stopped. Run the same command to go on.")
        if self.asked and number == signal.SIGHUP:
            return
        if self.asked:
            self._end(
                f"{name} again: stopped at once. Run the same command to go on from what is saved."
            )
        self.asked = True
        say(f"{name}: finishing this update, then saving.")

    def _end(self, message: str) -> None:
        say(message)
        self._leave(STATUS, message)


def say(message: str) -> None:
    """Writes a line to standard error, from a signal handler or a thread."""
    # The terminal may be closed, and Ctrl-C also ends a `| tee` behind the run.
    with contextlib.suppress(OSError):
        # Not print: the signal may come in the middle of another line on the same stream.
        os.write(2, f"\n{message}\n".encode())
