"""Errors that a user can fix: each message says what, where, and what to do.

The command line prints the message alone and exits with status 2 (75 for `Interrupted`).
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

STATUS = 2
"""Exit status of a process that ends with one of these."""


class FlaxAsrError(Exception):
    """An error that the user can fix; the message is all they need."""


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
    """A run cannot continue, for example because its numbers are not finite."""


class AudioError(FlaxAsrError):
    """One clip cannot be used.

    Attributes:
        reason: a key of the table that `prepare` prints, for example "truncated".
        detail: what was seen in this file.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return type(self), (self.reason, self.detail)


class Interrupted(Exception):
    """The run was asked to stop and has saved everything; the same command resumes it."""


def why(error: Exception) -> str:
    """The reason for an error, for a message: the system's text, else the exception's own.

    A library may raise an `OSError` that does not come from the system.
    """
    system = error.strerror if isinstance(error, OSError) else None
    return system or str(error) or type(error).__name__


def seen_from(path: str | os.PathLike) -> str:
    """For a message about a missing path: the current folder, if the path is relative."""
    return "" if Path(path).is_absolute() else f" (seen from {Path.cwd()})"


@contextlib.contextmanager
def in_model(place: str | os.PathLike) -> Iterator[None]:
    """Adds the model's name to a ModelError raised inside."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{place}: {error}") from error
