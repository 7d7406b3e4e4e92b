"""`data.prepared_dir`: where prepared splits are, and what they were made from."""

import contextlib
import hashlib
import json
import os
import urllib.parse
from pathlib import Path
from typing import Any

from flax_asr import common_voice, config, errors, locks
from flax_asr.bucket import store
from flax_asr.data import shards


def folder(cfg: config.Config) -> Path:
    """The folder of the configuration's prepared splits.

    That is `data.prepared_dir` (its local copy if it is in a bucket), or else a folder beside
    output_dir. Its name depends on everything that its content depends on: source, language, text
    column, bounds and trimming, but not vocabulary or normalisation. If output_dir is in a bucket,
    the folder is in the user's cache folder, as memory maps need a local disk.
    """
    if cfg.data.prepared_dir is not None:
        return store.local_folder(cfg.data.prepared_dir, kind="prepared")
    cfg.require("output_dir", "data.source", "data.language")
    key = hashlib.sha256(json.dumps(content(cfg), sort_keys=True).encode()).hexdigest()[:12]
    if store.is_remote(cfg.output_dir):
        parent = store.cache_folder()
    else:
        parent = Path(cfg.output_dir).parent
    return parent / f"prepared-{key}"


def split_folders(cfg: config.Config) -> dict[str, Path]:
    """The folder of every split that the configuration names, prepared or not; train first."""
    data, above = cfg.data, folder(cfg)
    names = dict.fromkeys((*data.train_splits, *data.eval_splits, *data.test_splits))
    return {name: above / urllib.parse.quote(name, safe="") for name in names}


def is_prepared(cfg: config.Config) -> bool:
    """Whether every split that the configuration names is prepared."""
    return all(map(shards.is_finished, split_folders(cfg).values()))


def alone_in(path: Path) -> contextlib.AbstractContextManager[None]:
    """Waits until no other process prepares this folder; a lock ends with its process."""
    return locks.alone_in(path, "prepare", errors.DataError, "Name another data.prepared_dir")


def is_in_bucket(cfg: config.Config) -> bool:
    """Whether prepared data are in a bucket, so that one machine prepares them for all."""
    return cfg.data.prepared_dir is not None and store.is_remote(cfg.data.prepared_dir)


def bucket_urls(cfg: config.Config) -> dict[str, str]:
    """The URL of every split; empty if `data.prepared_dir` is not in a bucket."""
    place = cfg.data.prepared_dir
    if not is_in_bucket(cfg):
        return {}
    return {split: f"{place.rstrip('/')}/{path.name}" for split, path in split_folders(cfg).items()}


def content(cfg: config.Config) -> dict[str, Any]:
    """The options that the content of prepared splits depends on."""
    source = cfg.data.source
    place = os.path.abspath(source) if common_voice.is_path(source) else source
    return _settings(cfg) | {"source": place}


def made_from(cfg: config.Config, split: str) -> dict[str, Any]:
    """What a prepared split is made from: the options that change it, and its source."""
    source, language = cfg.data.source, cfg.data.language
    found = source and common_voice.fingerprint(source, language=language, split=split)
    return _settings(cfg) | {"fingerprint": found}


def fits(cfg: config.Config) -> bool:
    """Whether all splits are prepared, from the present `data.source` and with the same options."""
    return is_prepared(cfg) and all(
        shards.PreparedSplit.open(path).manifest["settings"] == made_from(cfg, split)
        for split, path in split_folders(cfg).items()
    )


def check(split: shards.PreparedSplit, settings: dict[str, Any]) -> None:
    """Refuses a split that was made from something else.

    Args:
        split: the prepared split.
        settings: what `made_from` returns for it now.

    Raises:
        errors.DataError: they differ.
    """
    was = split.manifest["settings"]
    mend = f"Name another data.prepared_dir, or delete {split.folder} to prepare it again."
    for name, now in settings.items():
        if name != "fingerprint" and was[name] != now:
            raise errors.DataError(
                f"{split.folder} was prepared with data.{name} {was[name]}, the configuration says"
                f" {now}. {mend}"
            )
    if None not in (settings["fingerprint"], was["fingerprint"]) and (
        settings["fingerprint"] != was["fingerprint"]
    ):
        raise errors.DataError(
            f"{split.folder} was prepared from another source than data.source, or the source has"
            f" changed since. {mend}"
        )


def _settings(cfg: config.Config) -> dict[str, Any]:
    return {
        "language": cfg.data.language,
        "text_column": cfg.data.text_column,
        "min_seconds": float(cfg.data.min_seconds),
        "max_seconds": float(cfg.data.max_seconds),
        "trim_silence": cfg.data.trim_silence,
    }
