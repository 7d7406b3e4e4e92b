"""log.jsonl: one JSON object for each logging event; also TensorBoard if it is installed."""

import contextlib
import importlib.util
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flax_asr import atomic, errors

logger = logging.getLogger(__name__)

FILE = "log.jsonl"
BOARD = "tensorboard"


class RunLog:
    """Appends events to a run's log.

    Args:
        run: the run folder.
        keep: number of events to keep: a resumed run writes later ones again.
        after: the step that the run resumes from.
        writes: whether this host writes; the others only keep the events in memory.

    Attributes:
        events: all of them, oldest first.

    Raises:
        CheckpointError: the log cannot be written.
    """

    def __init__(self, run: Path, keep: int, after: int, writes: bool = True):
        self._path = run / FILE
        self._writes, self._complete = writes, not writes
        self.events = read(run)[:keep]
        if writes and len(self.events) < keep:
            logger.warning(
                "warning: %s has %d of the %d events that were there: the others are lost, and so"
                " are their scores",
                self._path,
                len(self.events),
                keep,
            )
        self.flush()
        self._board = _board(run, after) if writes else None

    def append(self, event: dict[str, Any]) -> None:
        """Writes one event; it is on disk when this returns.

        Values that are not finite are left out, as JSON cannot express them.

        Raises:
            CheckpointError: the log cannot be written. The event is kept for the next `append` or
                `flush`.
        """
        finite = {
            name: value
            for name, value in event.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        self.events.append(finite)
        if self._writes:
            appends = self._complete and self._path.exists()
            self._write([finite] if appends else self.events, anew=not appends)
        if self._board is not None:
            self._board.add(finite)

    def flush(self) -> None:
        """Writes events that could not be written before, if any.

        Raises:
            CheckpointError: the log still cannot be written.
        """
        if not self._complete:
            self._write(self.events, anew=True)

    def evaluated(self, step: int) -> bool:
        """Whether the log has the scores of this step."""
        return any("eval_clips" in event and event["step"] == step for event in self.events)

    def best(self, name: str) -> float:
        """The lowest value of `name` in the log, or infinity."""
        return min((e[name] for e in self.events if name in e), default=float("inf"))

    def last(self, name: str, otherwise: int) -> int:
        """The newest value of `name` in the log, or `otherwise`."""
        return next((e[name] for e in reversed(self.events) if name in e), otherwise)

    def close(self) -> None:
        """Closes TensorBoard's file; the log itself is closed after every line."""
        if self._board is not None:
            self._board.close()

    def _write(self, events: Iterable[dict[str, Any]], anew: bool) -> None:
        lines = [json.dumps(e, ensure_ascii=False, allow_nan=False) + "\n" for e in events]
        # If writing fails, part of a line may be there: the whole file is then rewritten.
        self._complete = False
        try:
            if anew:
                with atomic.replacing(self._path) as unfinished:
                    unfinished.write_text("".join(lines), encoding="utf-8")
            else:
                with self._path.open("a", encoding="utf-8") as file:
                    file.writelines(lines)
                atomic.sync(self._path)
        except OSError as error:
            raise errors.CheckpointError(
                f"cannot write {self._path}: {errors.why(error)}. Make room or fix the folder,"
                " then run the same command again: it goes on from the newest checkpoint."
            ) from error
        self._complete = True


class _Board:
    """Scalars for TensorBoard; it gives up after a failed write, as log.jsonl has them too.

    Does not use tensorboardX's SummaryWriter, whose thread dies with a traceback on a full disk.
    """

    def __init__(self, run: Path, after: int):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._event, self._scalar = event_pb2.Event, summary.scalar
        folder = run / BOARD
        folder.mkdir(parents=True, exist_ok=True)
        # The suffix keeps two starts within a second from sharing a file.
        self._writer = event_file_writer.EventsWriter(str(folder / "events"), f".after-{after}")
        # TensorBoard drops what an earlier start wrote from this step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(self._event(step=after + 1, session_log=start))
        self._works = True

    def add(self, event: dict[str, Any]) -> None:
        scalars = [
            self._scalar(name, value)
            for name, value in event.items()
            if name != "step" and isinstance(value, (int, float))
        ]
        self._write(
            [self._event(wall_time=time.time(), step=event["step"], summary=s) for s in scalars]
        )

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()

    def _write(self, events: Iterable[Any]) -> None:
        if self._works:
            try:
                for event in events:
                    self._writer.write_event(event)
                self._writer.flush()
            except OSError:
                self._works = False


def _board(run: Path, after: int) -> _Board | None:
    if importlib.util.find_spec("tensorboardX") is not None:
        with contextlib.suppress(OSError):
            return _Board(run, after)
    return None


def evaluations_since_best(history: Iterable[Mapping[str, Any]], name: str) -> int:
    """Number of evaluations after the one with the lowest `name`, the first of equal ones."""
    best, since = float("inf"), 0
    for event in history:
        if "eval_clips" in event:
            since += 1
            if name in event and event[name] < best:
                best, since = event[name], 0
    return since


def read(run: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first, up to the first line that is truncated or not an event."""
    path = run / FILE
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(event, dict) or not isinstance(event.get("step"), int):
            break
        events.append(event)
    return events
