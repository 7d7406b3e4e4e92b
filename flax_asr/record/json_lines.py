"""A file of JSON objects, one a line, that is there as a whole or not at all."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flax_asr import atomic, errors


def write(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the file.

    Processes that write the same one at once do not mix their lines: the last to end is there.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with (
            atomic.replacing(path, shared=True) as unfinished,
            # A transcript or an id may hold half a surrogate pair: written as it came.
            unfinished.open("w", encoding="utf-8", errors="surrogatepass") as file,
        ):
            for content in objects:
                file.write(json.dumps(content, ensure_ascii=False) + "\n")
    except OSError as error:
        raise errors.CheckpointError(f"cannot write {path}: {errors.why(error)}.") from error
