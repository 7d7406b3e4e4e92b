"""Seals: size and sha256 of every file in a folder, to detect damage."""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from flax_asr import atomic, errors

FILE = "seal.json"


def sha256(path: Path) -> str:
    """The hash of a file's content, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path) -> None:
    """Seals a folder after syncing its files to disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != FILE):
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        # If the machine is lost, so is what the system has not yet written.
        atomic.sync(path)
    (folder / FILE).write_text(json.dumps(files, indent=1), encoding="utf-8")
    atomic.sync(folder / FILE)


def verify(folder: Path, *names: str) -> None:
    """Compares files with the seal: all of them, or only those named.

    Raises:
        CheckpointError: a file differs from the seal; names the first.
    """
    sealed = _read(folder / FILE)
    for name in names or sealed:
        path = folder / name
        if name not in sealed:
            raise errors.CheckpointError(f"{folder / FILE} does not name {name}")
        expected = sealed[name]
        if not path.is_file():
            raise errors.CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise errors.CheckpointError(f"{path} has {size} bytes instead of {expected['bytes']}")
        try:
            digest = sha256(path)
        except OSError as error:
            raise errors.CheckpointError(f"{path} cannot be read: {errors.why(error)}") from error
        if digest != expected["sha256"]:
            raise errors.CheckpointError(f"{path} has changed since it was written (sha256)")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise errors.CheckpointError(f"{path} cannot be read: {error}") from error
    whole = isinstance(sealed, dict) and all(
        isinstance(file, dict) and file.keys() == {"bytes", "sha256"} for file in sealed.values()
    )
    if not whole or not sealed:
        raise errors.CheckpointError(f"{path} is not a seal any more")
    for name in map(PurePosixPath, sealed):
        if name.is_absolute() or ".." in name.parts:
            raise errors.CheckpointError(f"{path} names {name}, which is not in its folder")
    return sealed
