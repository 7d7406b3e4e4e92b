"""What a write in many threads says besides the one error that it raises, kept from the user.

Where a disk is full, orbax logs a traceback, and asyncio and Python show one of each array that was
still being written then, or failed too, whenever they come upon it.
"""

import contextlib
import gc
import logging
import sys
import traceback
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def hidden(told: tuple[type[Exception], ...]) -> Iterator[None]:
    """Nothing is shown of such errors, which the caller tells; afterwards all is as it was."""
    log, tasks, show = logging.getLogger("absl"), logging.getLogger("asyncio"), sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    def is_another(record: logging.LogRecord) -> bool:
        loose = "exception was never retrieved" in record.getMessage()
        return not (loose and record.exc_info and isinstance(record.exc_info[1], told))

    level = log.level
    log.setLevel(logging.CRITICAL)
    tasks.addFilter(is_another)
    sys.unraisablehook = show_others
    try:
        yield
    finally:
        sys.unraisablehook = show
        tasks.removeFilter(is_another)
        log.setLevel(level)


def drop(error: Exception) -> None:
    """Has those that an error's frames hold on to come up now, while they are hidden."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
