"""Asked to stop: SIGTERM (preemption, a scheduler) and SIGINT (a person)."""

import logging
import signal

logger = logging.getLogger(__name__)


class Stop:
    """Remembers SIGTERM and SIGINT; a second one ends the process at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Stop":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True
        logger.warning("%s: finishing this update, then saving", signal.Signals(number).name)
