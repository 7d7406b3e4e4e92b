"""Prepared clips that training or a score leaves out, and why: left_out.jsonl of a run, and what
stands beside the predictions of a score."""

import logging
from collections.abc import Mapping
from pathlib import Path

from flax_asr import errors
from flax_asr.data import examples
from flax_asr.record import json_lines

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
    _write(folder / FILE, sets)
    for name, data in sets.items():
        if data.left_out:
            logger.info(
                "%s: of the prepared clips %d are left out: %s (%s in the run folder names each)",
                name,
                len(data.left_out),
                data.left_out_summary(),
                FILE,
            )


def beside(predictions: Path, split: str, data: examples.Examples) -> Path | None:
    """Names the clips that a score leaves out in a file beside that of its predictions.

    Returns:
        The file; None where nothing is left out, and so there is none.

    Raises:
        CheckpointError: the file cannot be written, or an old one not removed.
    """
    path = predictions.with_name(predictions.name.replace("predictions", "left_out", 1))
    if not data.left_out:
        try:
            path.unlink(missing_ok=True)  # of an earlier score
        except OSError as error:
            raise errors.CheckpointError(f"cannot remove {path}: {errors.why(error)}.") from error
        return None
    _write(path, {split: data})
    return path


def _write(path: Path, sets: Mapping[str, examples.Examples]) -> None:
    entries = ((name, entry) for name, data in sets.items() for entry in data.left_out)
    json_lines.write(path, ({"set": name, **entry._asdict()} for name, entry in entries))
