"""log.jsonl: one JSON object for each logging event; TensorBoard too where it is installed."""

import importlib.util
import json
from pathlib import Path
from typing import Any

FILE = "log.jsonl"


class RunLog:
    """Appends events to a run's log.

    Args:
        run: the run folder.
        keep_until: events of later steps are dropped: a resumed run writes them again.
    """

    def __init__(self, run: Path, keep_until: int):
        self._path = run / FILE
        kept = [event for event in read(run) if event["step"] <= keep_until]
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text("".join(map(_line, kept)), encoding="utf-8")
        unfinished.replace(self._path)
        self._board = None
        if importlib.util.find_spec("tensorboardX") is not None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=keep_until + 1)

    def append(self, event: dict[str, Any]) -> None:
        """Writes one event; it is on the disk when this returns."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(_line(event))
        if self._board is not None:
            for name, value in event.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(name, value, event["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read(run: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; a line cut short by a kill ends them."""
    path = run / FILE
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event, ensure_ascii=False) + "\n"
