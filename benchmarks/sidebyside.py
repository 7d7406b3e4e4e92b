"""Ways of doing the same work, timed in turns, and their figures written for programs.

On a machine that others use too, only figures taken side by side can be compared.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def medians(
    ways: Mapping[str, Callable[[], Any]], runs: int, *, warm_up: int = 2, clock=time.perf_counter
) -> dict[str, float]:
    """Median seconds of each way; they take turns, and the first turns do not count.

    Args:
        ways: what to run, by name.
        runs: turns that count.
        warm_up: turns before them.
        clock: `time.process_time` for processor time, which other programs hardly change.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warm_up + runs):
        for name, run in ways.items():
            started = clock()
            run()
            if turn >= warm_up:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def write_json(path: str | os.PathLike | None, rows: Iterable[Mapping[str, Any]]) -> None:
    """One object a line; nowhere if there is no path."""
    if path is not None:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
