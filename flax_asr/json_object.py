"""JSON objects: read from untrusted files (settings, symbols and history of a model), and written
so that any program can read them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_asr import errors

_MOST_BYTES = 64 * 2**20


def parse(content: bytes) -> dict[str, Any]:
    """The object in UTF-8 text; a name that occurs twice is an error.

    Raises:
        ValueError: it is something else, or has a name twice.
    """
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def read(path: Path) -> dict[str, Any] | None:
    """The object in a small file; None if there is no such file.

    Raises:
        ModelError: it cannot be read, is larger than 64 MiB, or is not a JSON object.
    """
    if not path.is_file():
        return None
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise errors.ModelError(f"{path}: {size} bytes are too many for such a file.")
        return parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise errors.ModelError(f"{path} cannot be read: {error}.") from error


def readable(value: Any) -> Any:
    """The value with None for NaN and infinity, for which Python writes words that are not JSON."""
    if isinstance(value, Mapping):
        return {key: readable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [readable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
