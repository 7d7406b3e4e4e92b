"""A file of JSON objects, one a line, that appears under its name when it is complete."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flax_asr import atomic, errors

Write = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def writer(path: Path) -> Iterator[Write]:
    """Until the block ends well, an older file of this name stays.

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

            def write(line: Mapping[str, Any]) -> None:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

            yield write
    except OSError as error:
        raise errors.CheckpointError(f"cannot write {path}: {error.strerror}.") from error
