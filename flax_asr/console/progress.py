"""Progress on standard error: a bar on a terminal, a plain line now and then in a log."""

import contextlib
import io
import sys
import time
from typing import Any

from flax_asr.console import terminal

LINE_SECONDS = 30.0
_shown = True


def hide() -> None:
    """Shows no progress in this process from now on, as another host shows it."""
    global _shown
    _shown = False


class Progress:
    """Counts towards a total; use it in a `with` statement.

    Args:
        total: number of units; None if unknown.
        description: what is being done, in one or two words.
        unit: name of the units.
        initial: number of units done before.
        stream: where to write; standard error by default.
        line_seconds: time between two lines if the stream is not a terminal.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        unit: str,
        *,
        initial: int = 0,
        stream: io.TextIOBase | None = None,
        line_seconds: float = LINE_SECONDS,
    ) -> None:
        self.total = total
        self.description = description
        self.unit = unit
        self.done = initial
        self._initial = self._last_written = initial
        self._stream = stream if stream is not None else sys.stderr
        self._line_seconds = line_seconds
        self._facts: dict[str, Any] = {}
        self._bar = None

    def __enter__(self) -> "Progress":
        self._start = self._last_line = time.monotonic()
        if _shown and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total,
                desc=self.description,
                unit=f" {self.unit}",
                initial=self._initial,
                file=self._stream,
                dynamic_ncols=True,
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self.done > self._last_written:
            self._write_line()

    def advance(self, n: int = 1, **facts: Any) -> None:
        """Counts `n` more units; `facts` are shown beside the count until replaced."""
        self.done += n
        self._facts |= facts
        if self._bar is not None:
            if facts:
                self._bar.set_postfix_str(self._facts_text(), refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._last_line >= self._line_seconds:
            self._write_line()

    def write(self, line: str) -> None:
        """Writes a line of text without breaking the bar."""
        if self._bar is None:
            terminal.tell(line, self._stream)
            return
        with contextlib.suppress(OSError):  # as `tell`
            self._bar.write(terminal.plain(line), file=self._stream)

    def _write_line(self) -> None:
        self._last_line, self._last_written = time.monotonic(), self.done
        if not _shown:
            return
        elapsed_seconds = max(self._last_line - self._start, 1e-9)
        per_second = (self.done - self._initial) / elapsed_seconds
        count = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        parts = [f"{self.description}: {count} {self.unit}", f"{per_second:.3g}/s"]
        if self.total is not None and self.done < self.total and per_second > 0:
            parts.append(f"{_duration((self.total - self.done) / per_second)} left")
        if self._facts:
            parts.append(self._facts_text())
        terminal.tell(", ".join(parts), self._stream)

    def _facts_text(self) -> str:
        return ", ".join(f"{name} {_short(value)}" for name, value in self._facts.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
