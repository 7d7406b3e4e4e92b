"""A file of JSON objects, one a line, that appears under its name when it is complete."""

import contextlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flax_asr import errors

Write = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def writer(path: Path) -> Iterator[Write]:
    """Until the block ends well, an older file of this name stays.

    Processes that write the same one at once do not mix their lines: the last to end is there.

    Raises:
        CheckpointError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        # A transcript or an id may hold half a surrogate pair: written as it came.
        with unfinished.open("x", encoding="utf-8", errors="surrogatepass") as file:

            def write(line: Mapping[str, Any]) -> None:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

            yield write
        unfinished.replace(path)
    except OSError as error:
        raise errors.CheckpointError(f"cannot write {path}: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
