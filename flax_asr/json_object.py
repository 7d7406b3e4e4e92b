"""JSON objects: read from files of strangers (settings of a model, its symbols, its history), and
as any program can read them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_asr import errors

_MOST_BYTES = 64 * 2**20


def parse(content: bytes) -> dict[str, Any]:
    """An object of UTF-8 text, in which every name stands once.

    Raises:
        ValueError: says what it is instead.
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
    """What a small file holds; None where there is no such file.

    Raises:
        ModelError: it cannot be read, is larger than 64 MiB, or holds no JSON object.
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
    """The same with null for NaN and infinity: Python writes words that other readers refuse."""
    if isinstance(value, Mapping):
        return {key: readable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [readable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
