"""Prepared splits that lie in a bucket: copied to the local disk once, put there when made here.

The copy is verified by the hashes of its manifest before it has its name.
"""

import json
import logging
import shutil
from pathlib import Path

from flax_asr import atomic, errors
from flax_asr.bucket import store
from flax_asr.data import shards

logger = logging.getLogger(__name__)


def fetch(url: str, folder: Path) -> None:
    """Makes a local split like that of the store, if there is one and they differ.

    Raises:
        DataError: what the store has is damaged.
        StoreError: the store cannot be read.
    """
    place = store.Store(url)
    manifest, local = place.read(shards.MANIFEST), folder / shards.MANIFEST
    if manifest is None or (local.is_file() and local.read_bytes() == manifest):
        return
    logger.info("copying %s to %s", place.url, folder)
    unfinished = atomic.unfinished(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    place.download({name: unfinished / name for name in place.list()})
    try:
        shards.PreparedSplit.open(unfinished, verify=True)
    except errors.DataError as error:
        raise errors.DataError(
            f"{place.url} is damaged, or was while it was copied: {error}"
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def send(folder: Path, url: str) -> None:
    """Puts a finished split into the store, its manifest last, where the store has none.

    Raises:
        StoreError: the store cannot be written.
    """
    place, manifest = store.Store(url), folder / shards.MANIFEST
    if place.read(shards.MANIFEST) is None:
        logger.info("copying %s to %s", folder, place.url)
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        place.upload({name: folder / name for name in files})
        place.upload({shards.MANIFEST: manifest})
