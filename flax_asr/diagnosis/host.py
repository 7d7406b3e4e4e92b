"""The machine without its devices: versions, cores, free memory and disk."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import flax_asr
from flax_asr import config
from flax_asr.bucket import store
from flax_asr.data import pool, prepared_dir

_PACKAGES = "jax jaxlib flax optax orbax-checkpoint transformers numpy soundfile soxr".split()


def facts(cfg: config.Config) -> dict[str, Any]:
    """Versions, cores, free memory and disk of this machine."""
    versions = {"flax_asr": flax_asr.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    places = {"output_dir": cfg.output_dir, "prepared": str(prepared_dir.folder(cfg))}
    return {
        "versions": versions,
        "cores": pool.available_cores(),
        "memory_bytes": free_memory(),
        "disk": {
            name: free_disk(place) | {"writable": is_writable(place)}
            for name, place in places.items()
        },
    }


def free_memory() -> int | None:
    """Bytes of memory available to programs; None if the system does not tell (Linux does)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def free_disk(place: str) -> dict[str, Any]:
    """Free bytes where a folder is or will be; None for a bucket."""
    if store.is_remote(place):
        return {"path": place, "device": None, "free_bytes": None}
    path = _there(place)
    return {
        "path": str(path),
        "device": os.stat(path).st_dev,
        "free_bytes": shutil.disk_usage(path).free,
    }


def is_writable(place: str) -> bool | None:
    """Whether files can be created where a folder is or will be; None for a bucket."""
    if store.is_remote(place):
        return None
    path = _there(place)
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def _there(place: str) -> Path:
    """The path itself, or its nearest parent that exists."""
    path = Path(place).absolute()
    while not path.exists():
        path = path.parent
    return path
