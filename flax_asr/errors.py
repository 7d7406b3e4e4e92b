"""The errors a user can meet and mend: each message says what, where, and what to do.

The command line prints the message alone and exits with status 2 (75 for `Interrupted`).
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

STATUS = 2
"""Of a process that ends with one of these."""


class FlaxAsrError(Exception):
    """What went wrong is in the user's hands; the message is all they need."""


class ConfigError(FlaxAsrError):
    """A configuration file or an option on the command line cannot be used."""


class DataError(FlaxAsrError):
    """A corpus, a prepared folder or a transcript table cannot be used."""


class ModelError(FlaxAsrError):
    """A model folder, a weight file or a model configuration cannot be used."""


class CheckpointError(FlaxAsrError):
    """A run folder or a checkpoint cannot be used."""


class StoreError(FlaxAsrError):
    """A bucket cannot be read or written."""


class TrainingError(FlaxAsrError):
    """A run cannot go on: its numbers are bad."""


class AudioError(FlaxAsrError):
    """One clip cannot be used.

    Attributes:
        reason: one word of the table that `prepare` prints, for example "truncated".
        detail: what was seen in this file.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return type(self), (self.reason, self.detail)


class Interrupted(Exception):
    """The run was asked to stop and saved everything; the same command goes on from there."""


def why(error: Exception) -> str:
    """For a message: the system's words for what went wrong, else those of who raised it.

    A library may raise an `OSError` that is none of the system's.
    """
    system = error.strerror if isinstance(error, OSError) else None
    return system or str(error) or type(error).__name__


def seen_from(path: str | os.PathLike) -> str:
    """For a message about a path that leads nowhere: where it began, if that is not said."""
    return "" if Path(path).is_absolute() else f" (seen from {Path.cwd()})"


@contextlib.contextmanager
def in_model(place: str | os.PathLike) -> Iterator[None]:
    """Says of which model it is what a ModelError inside says."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{place}: {error}") from error
