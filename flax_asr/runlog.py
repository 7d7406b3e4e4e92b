"""log.jsonl: one JSON object for each logging event; TensorBoard too where it is installed."""

import importlib.util
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flax_asr import errors

FILE = "log.jsonl"


class RunLog:
    """Appends events to a run's log.

    Args:
        run: the run folder.
        keep: the events after so many are dropped: a resumed run writes them again.
        after: the step that the run goes on after.
        writes: whether this host writes; the others only remember.

    Attributes:
        events: all of them, oldest first.
    """

    def __init__(self, run: Path, keep: int, after: int, writes: bool = True):
        self._path, self._writes = run / FILE, writes
        self.events = read(run)[:keep]
        self._board = None
        if not writes:
            return
        unfinished = self._path.with_name(f".{FILE}.unfinished")
        self._write(unfinished, "w", self.events)
        unfinished.replace(self._path)
        if importlib.util.find_spec("tensorboardX") is not None:
            from tensorboardX import SummaryWriter

            # The suffix keeps two starts within a second from sharing a file.
            self._board = SummaryWriter(
                str(run / "tensorboard"),
                purge_step=after + 1,
                filename_suffix=f".after-{after}",
            )

    def append(self, event: dict[str, Any]) -> None:
        """Writes one event; it is on the disk when this returns.

        Figures that are not finite are left out: JSON has no word for them.

        Raises:
            CheckpointError: it cannot be written.
        """
        finite = {
            name: value
            for name, value in event.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        if self._writes:
            self._write(self._path, "a", [finite])
        self.events.append(finite)
        if self._board is not None:
            for name, value in finite.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(name, value, event["step"])

    def evaluated(self, step: int) -> bool:
        """Whether it has the scores of this step."""
        return any("eval_clips" in event and event["step"] == step for event in self.events)

    def best(self, name: str) -> float:
        """The lowest `name` that it has, infinity where it has none."""
        return min((e[name] for e in self.events if name in e), default=float("inf"))

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _write(self, path: Path, mode: str, events: Iterable[dict[str, Any]]) -> None:
        try:
            with open(path, mode, encoding="utf-8") as file:
                for event in events:
                    file.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise errors.CheckpointError(
                f"cannot write {path}: {error.strerror}. Make room or mend the folder, then run the"
                " same command again: it goes on from the newest checkpoint."
            ) from error


def read(run: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; a line cut short by a kill ends them."""
    path = run / FILE
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events
