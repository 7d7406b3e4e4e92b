"""log.jsonl: one JSON object for each logging event; TensorBoard too where it is installed."""

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
        keep: the events after so many are dropped: a resumed run writes them again.
        after: the step that the run goes on after.
        writes: whether this host writes; the others only remember.

    Attributes:
        events: all of them, oldest first.

    Raises:
        CheckpointError: it cannot be written.
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
        """Writes one event; it is on the disk when this returns.

        Figures that are not finite are left out: JSON has no word for them.

        Raises:
            CheckpointError: it cannot be written. It is kept, and written by the next `append` or
                `flush` that can.
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
        """Writes what could not be written before, if anything.

        Raises:
            CheckpointError: it still cannot.
        """
        if not self._complete:
            self._write(self.events, anew=True)

    def evaluated(self, step: int) -> bool:
        """Whether it has the scores of this step."""
        return any("eval_clips" in event and event["step"] == step for event in self.events)

    def best(self, name: str) -> float:
        """The lowest `name` that it has, infinity where it has none."""
        return min((e[name] for e in self.events if name in e), default=float("inf"))

    def last(self, name: str, otherwise: int) -> int:
        """The newest `name` that it has, `otherwise` where it has none."""
        return next((e[name] for e in reversed(self.events) if name in e), otherwise)

    def close(self) -> None:
        """Lets go of TensorBoard's file; the log itself is closed after every line."""
        if self._board is not None:
            self._board.close()

    def _write(self, events: Iterable[dict[str, Any]], anew: bool) -> None:
        lines = [json.dumps(e, ensure_ascii=False, allow_nan=False) + "\n" for e in events]
        # Until it has worked, a part may be there: then the whole file is written anew.
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
                f"cannot write {self._path}: {errors.why(error)}. Make room or mend the folder,"
                " then run the same command again: it goes on from the newest checkpoint."
            ) from error
        self._complete = True


class _Board:
    """Scalars for TensorBoard, given up once they cannot be written: log.jsonl has them too.

    Without tensorboardX's SummaryWriter, whose thread dies of a full disk with a traceback.
    """

    def __init__(self, run: Path, after: int):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._event, self._scalar = event_pb2.Event, summary.scalar
        folder = run / BOARD
        folder.mkdir(parents=True, exist_ok=True)
        # The suffix keeps two starts within a second from sharing a file.
        self._writer = event_file_writer.EventsWriter(str(folder / "events"), f".after-{after}")
        # From here on, whatever an earlier start wrote is void.
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
    """How many evaluations came after the one with the lowest `name`; of equals the first."""
    best, since = float("inf"), 0
    for event in history:
        if "eval_clips" in event:
            since += 1
            if name in event and event[name] < best:
                best, since = event[name], 0
    return since


def read(run: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; a line that is cut short, or not an event, ends them."""
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
