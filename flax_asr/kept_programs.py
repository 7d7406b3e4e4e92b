"""JAX's persistent compilation cache, without damaged entries.

JAX writes an entry in place, and never again while its file exists. So an entry that was truncated
by a kill or a full disk, or has changed since, would cause a warning and a compilation at every
start.
"""

import concurrent.futures
import contextlib
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

logger = logging.getLogger(__name__)

_ENTRIES = "*-cache"  # jax/_src/lru_cache.py
_BYTES_AT_ONCE = 2**16
_ZSTANDARD = b"\x28\xb5\x2f\xfd"


@contextlib.contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Programs compiled in this context are kept in a folder, for a resumed run.

    Afterwards JAX's cache is where it was before.
    """
    _discard_damaged(folder)
    before = jax.config.jax_compilation_cache_dir
    _tell_jax(str(folder))
    try:
        yield
    finally:
        _tell_jax(before)


def _tell_jax(folder: str | None) -> None:
    # JAX reads the setting once in a process: without this it would keep the earlier folder.
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", folder)


def _discard_damaged(folder: Path) -> None:
    """Removes the entries of a folder that cannot be unpacked, and logs how many.

    zlib's checksum detects damage. Entries that JAX packs with Zstandard, if that is installed, are
    not checked.
    """
    entries = sorted(folder.glob(_ENTRIES))
    with concurrent.futures.ThreadPoolExecutor() as threads:
        damaged = [
            entry
            for entry, whole in zip(entries, threads.map(_is_whole, entries), strict=True)
            if not whole
        ]
    for entry in damaged:
        with contextlib.suppress(OSError):
            entry.unlink()
    if damaged:
        logger.warning(
            "warning: %d of %d compiled programs in %s were damaged or half written: they are"
            " compiled again.",
            len(damaged),
            len(entries),
            folder,
        )


def _is_whole(entry: Path) -> bool:
    unpacked = zlib.decompressobj()
    try:
        with entry.open("rb") as file:
            piece = file.read(_BYTES_AT_ONCE)
            if piece.startswith(_ZSTANDARD):
                return True
            while piece:
                unpacked.decompress(piece)
                piece = file.read(_BYTES_AT_ONCE)
    except (OSError, zlib.error):
        return False
    return unpacked.eof
