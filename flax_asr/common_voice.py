"""Clip records from a Common Voice release, or from another source of clips and sentences."""

import hashlib
import json
import os
import pathlib

from flax_asr import errors, seals
from flax_asr.bucket import store
from flax_asr.sources import clips, hub, manifests, release_archive, release_folder, tables

Clip = clips.Clip
Source = clips.Source

_FORMS = (
    "a release folder, its .tar.gz, parquet:GLOB, hf:NAME[:CONFIG], or a .csv, .tsv or .jsonl "
    "manifest with the columns path and sentence"
)
# Files that are none of these, and what to do with them.
_MENDED = {
    ".zip": "; unpack it and name the folder",
    ".parquet": "; write parquet: before it",
    ".json": "; a file with one object a line is called .jsonl",
}
_HASHED_BYTES = 512 * 2**20


def open_source(source: str, *, language: str, text_column: str | None = None) -> Source:
    """Finds out which kind of source `data.source` is, and which splits it has.

    Args:
        source: as in the configuration: a release folder (the language's own or the one above
            it), its .tar.gz, `parquet:GLOB`, `hf:NAME[:CONFIG]`, or a manifest.
        language: the language within a release; a warning tells of clips with another `locale`.
        text_column: the column of the transcript; by default `sentence`, or `transcription` in a
            release of spontaneous speech.

    Raises:
        errors.DataError: it does not exist, is none of these, or lacks a needed column.
    """
    column = text_column or "sentence"
    if source.startswith("parquet:"):
        return hub.parquet(source.removeprefix("parquet:"), column, language)
    if source.startswith("hf:"):
        return hub.dataset(source.removeprefix("hf:"), column, language)
    if store.is_remote(source):
        raise errors.DataError(
            f"data.source {source}: a corpus is read from a disk: copy it to this machine. What"
            " `flax-asr prepare` makes of it can lie in a bucket (data.prepared_dir)"
        )
    path = pathlib.Path(os.path.expanduser(source))
    if path.is_dir():
        return release_folder.source(path.resolve(), language, text_column)
    if not path.is_file():
        raise errors.DataError(
            f"data.source {source}: nothing is there{errors.seen_from(path)}. It may be {_FORMS}"
        )
    if path.suffix.lower() in tables.SUFFIXES:
        return manifests.source(path, column, language)
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar")):
        return release_archive.source(path, language, text_column)
    mend = _MENDED.get(path.suffix.lower(), "")
    raise errors.DataError(
        f"data.source {source}: cannot tell what it is{mend}. It may be {_FORMS}"
    )


def is_path(source: str) -> bool:
    """Whether `data.source` is a path, rather than `parquet:` files or an `hf:` dataset."""
    return not source.startswith(("parquet:", "hf:"))


def fingerprint(source: str, *, language: str | None, split: str) -> str | None:
    """A string that differs between versions of a split's source; None if there is no source.

    Args:
        source, language: as for `open_source`.
        split: the split, under any of its names.
    """
    if source.startswith("hf:"):
        return hub.fingerprint(source.removeprefix("hf:"))
    if source.startswith("parquet:"):
        files = hub.parquet_files(source.removeprefix("parquet:"))
        found = next((files[name] for name in clips.names_of(split) if name in files), None)
        sizes = found and [(os.path.basename(file), os.path.getsize(file)) for file in found]
        return found and hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    table = path = pathlib.Path(source)
    if not path.is_file():
        table = release_folder.table_of(path, str(language), split)
    if table is None:
        return None
    size = table.stat().st_size
    if size > _HASHED_BYTES:  # an archive, which takes minutes to read
        return f"{table.name} {size} bytes"
    return seals.sha256(table)
