"""Asked to stop: SIGTERM (preemption, a scheduler) and SIGINT (a person)."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

STATUS = 75
"""EX_TEMPFAIL of sysexits.h: run again to go on."""


class Stop:
    """What SIGTERM and SIGINT do while a run owns the process.

    Outside of `deferred` there is nothing to save, and the process ends at once: a compilation in
    another thread could not be broken off in any other way. Inside, the signal is noted for the
    loop to see, and a second one ends the process.

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
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
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
    # Not print: it may have come in the middle of another line of the same stream.
    os.write(2, f"\n{message}\n".encode())
