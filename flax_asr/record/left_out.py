"""left_out.jsonl of a run: prepared clips that training or a score leaves out, and why."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from flax_asr import errors
from flax_asr.data import examples

logger = logging.getLogger(__name__)

FILE = "left_out.jsonl"
"""A clip is there once for every set that lacks it: set, id, reason, detail."""


def record(folder: Path, sets: Mapping[str, examples.Examples]) -> None:
    """Says how many clips are left out of each set and why; the file names each of them.

    Args:
        folder: of the run.
        sets: what is trained on and scored, by name.

    Raises:
        CheckpointError: the file cannot be written.
    """
    unfinished = folder / f".{FILE}.unfinished"
    try:
        # An id may hold half a surrogate pair: written as it came.
        with unfinished.open("w", encoding="utf-8", errors="surrogatepass") as file:
            for name, data in sets.items():
                for entry in data.left_out:
                    line = {"set": name, **entry._asdict()}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        unfinished.replace(folder / FILE)
    except OSError as error:
        raise errors.CheckpointError(f"cannot write {folder / FILE}: {error.strerror}.") from error
    for name, data in sets.items():
        if data.left_out:
            logger.info(
                "%s: of the prepared clips %d are left out: %s (%s in the run folder names each)",
                name,
                len(data.left_out),
                data.left_out_summary(),
                FILE,
            )
