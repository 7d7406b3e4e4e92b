"""A file of JSON objects, one a line, written completely or not at all."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flax_asr import atomic, errors


def write(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the file.

    If several processes write it at once, their lines do not mix: the last one to finish wins.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with (
            atomic.replacing(path, shared=True) as unfinished,
            # A transcript or an id may contain half a surrogate pair, which is kept.
            unfinished.open("w", encoding="utf-8", errors="surrogatepass") as file,
        ):
            for content in objects:
                file.write(json.dumps(content, ensure_ascii=False) + "\n")
    except OSError as error:
        raise errors.CheckpointError(f"cannot write {path}: {errors.why(error)}.") from error
