"""JSON objects in small files of strangers: settings of a model, its symbols, its history."""

import json
from pathlib import Path
from typing import Any

from flax_asr import errors

_MOST_BYTES = 64 * 2**20


def read(path: Path) -> dict[str, Any] | None:
    """What a file holds; None where there is no such file.

    Raises:
        ModelError: it cannot be read, is larger than 64 MiB, or holds no JSON object.
    """
    if not path.is_file():
        return None
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise errors.ModelError(f"{path}: {size} bytes are too many for such a file.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise errors.ModelError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise errors.ModelError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content
