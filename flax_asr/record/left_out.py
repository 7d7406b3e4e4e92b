"""Lists of prepared clips that are not trained on or not scored, and why: left_out.jsonl of a run,
and left_out-SPLIT.jsonl beside the predictions of a score."""

import logging
from collections.abc import Mapping
from pathlib import Path

from flax_asr import errors
from flax_asr.data import examples
from flax_asr.record import json_lines

logger = logging.getLogger(__name__)

FILE = "left_out.jsonl"
"""Keys: set, id, reason, detail. A clip is listed once for every set that it is left out of."""


def record(folder: Path, sets: Mapping[str, examples.Examples]) -> None:
    """Logs how many clips are left out of each set and why, and writes the list of them.

    Args:
        folder: the run folder.
        sets: the examples that are trained on and scored, by name.

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
    """Lists the clips that were not scored in a file beside that of the predictions.

    Returns:
        The file; None if nothing is left out, and so there is none.

    Raises:
        CheckpointError: the file cannot be written, or an old one cannot be removed.
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
