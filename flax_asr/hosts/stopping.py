"""Asked to stop: SIGTERM (preemption, a scheduler), SIGINT (a person), SIGHUP (a lost terminal)."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STATUS = 75
"""EX_TEMPFAIL of sysexits.h: run again to go on."""


class Stop:
    """What these signals do while a run owns the process.

    Outside of `deferred` there is nothing to save, and the process ends at once: a compilation in
    another thread could not be broken off in any other way. Inside, the signal is noted for the
    loop to see, and a second one ends the process; not SIGHUP, which comes twice of one terminal,
    by the system and by the shell. Where `nohup` has SIGHUP ignored it stays so. In a thread that
    is not the main one, which Python lets take no signals, they stay what they are.

    Args:
        leave: ends the process with a status, having told others why.

    Attributes:
        asked: a signal has come.
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
        """The loop inside looks at `asked` and saves."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def obey(self) -> None:
        """Ends the process if a signal came after the last look."""
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
    """A line on standard error, from a signal's handler or a thread."""
    # The terminal may be closed, and Ctrl-C ends a `| tee` behind the run as well.
    with contextlib.suppress(OSError):
        # Not print: it may have come in the middle of another line of the same stream.
        os.write(2, f"\n{message}\n".encode())
