"""Prepared splits in a bucket: downloaded once, and uploaded when prepared here.

A download is verified with the hashes in its manifest before it gets its name.
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
    """Downloads a split if the store has it and the local one differs.

    Raises:
        DataError: the split in the store is damaged.
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
    """Uploads a finished split, its manifest last, if the store does not have it.

    Raises:
        StoreError: the store cannot be written.
    """
    place, manifest = store.Store(url), folder / shards.MANIFEST
    if place.read(shards.MANIFEST) is None:
        logger.info("copying %s to %s", folder, place.url)
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        place.upload({name: folder / name for name in files})
        place.upload({shards.MANIFEST: manifest})
