"""Hides what a failed write in many threads prints besides the one error that it raises.

On a full disk orbax logs a traceback, and asyncio and Python later print one for each array that
was still being written, or failed too.
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
    """Suppresses output about errors of these types, which the caller reports."""
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
    """Collects the errors that an error's frames refer to now, while output is suppressed."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
