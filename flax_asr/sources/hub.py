"""Corpora in parquet files, on the Hugging Face hub, or saved by the library `datasets`."""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from flax_asr import errors
from flax_asr.sources import clips, tables

# Suffixes of files that are not recordings.
_TABLES = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tsv", ".txt")
_TAIL_BYTES = 16 * 2**20
# Pauses before the tries to reach the hub, and the time limit of each.
_PAUSES_SECONDS = (0.0, 1.0, 2.0)
_PATIENCE_SECONDS = 5.0


def _split_of(file: pathlib.PurePath) -> str:
    """The split of train-00000-of-00004.parquet, train.parquet and train/0000.parquet: train."""
    stem = re.sub(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]{8,})?$", "", file.stem)
    if stem in ("", "part", "data", "shard"):
        stem = file.parent.name or "train"
    return stem


def parquet_files(pattern: str) -> dict[str, list[str]]:
    """The files that match a pattern, by the split in their names."""
    splits: dict[str, list[str]] = {}
    for file in sorted(glob.glob(os.path.expanduser(pattern), recursive=True)):
        splits.setdefault(_split_of(pathlib.PurePath(file)), []).append(file)
    return splits


def parquet(pattern: str, column: str, language: str) -> clips.Source:
    """Parquet files as the hub holds them: `audio` with bytes and path, the transcript's column.

    Args:
        pattern: a shell pattern; `**` stands for any folders. Each file's name tells its split.
        column: the column of the transcript.
        language: its language; a column `locale` with another one causes a warning.

    Raises:
        errors.DataError: nothing matches, or a file is damaged or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    splits = parquet_files(pattern)
    files = [file for files in splits.values() for file in files]
    if not files:
        raise errors.DataError(f"parquet:{pattern}: no file matches")
    if folder := next(filter(os.path.isdir, files), None):
        raise errors.DataError(
            f"{folder} is a folder: for its files write parquet:{folder}/*.parquet"
        )
    for file in files:
        try:
            names = pq.read_schema(file).names
        except (pa.ArrowException, OSError) as error:
            raise errors.DataError(f"{file}: not a parquet file: {error}") from None
        tables.need(file, names, ("audio", column))
    readers = {
        split: functools.partial(
            _parquet_clips, f"parquet:{pattern}", split, files, column, language
        )
        for split, files in splits.items()
    }
    place = pathlib.PurePath(files[0]).parent
    return clips.Source(f"parquet:{pattern}", clips.release_name(place), readers)


def _parquet_clips(
    name: str, split: str, files: list[str], column: str, language: str
) -> Iterator[clips.Clip]:
    unique, locales = _Unique(split), tables.Locales(f"{name}, split {split}", language, "row")
    rows = ((pathlib.Path(file).parent, row) for file in files for row in _rows(file, column))
    for number, (folder, row) in enumerate(rows):
        locales.check(number, row)
        yield unique(_record(row, column, folder))


def _rows(file: str, column: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    facts = [name for names in clips.FACTS.values() for name in names]
    wanted = ["audio", "path", column, "locale", *facts]
    try:
        with pq.ParquetFile(file) as table:
            columns = [name for name in table.schema_arrow.names if name in wanted]
            for batch in table.iter_batches(batch_size=32, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise errors.DataError(f"{file}: damaged: {error}") from None


class _Unique:
    """Gives a clip a numbered id if it has none, or that of an earlier clip.

    File names in such corpora often come from different folders, which are not recorded.
    """

    def __init__(self, split: str):
        self._split = split
        self._count = 0
        self._seen: set[str] = set()

    def __call__(self, clip: clips.Clip) -> clips.Clip:
        if not clip.id or clip.id in self._seen:
            clip = dataclasses.replace(clip, id=f"{self._split}-{self._count}")
        self._seen.add(clip.id)
        self._count += 1
        return clip


def _record(row: Mapping[str, Any], column: str, folder: pathlib.Path | None) -> clips.Clip:
    """A clip from a row whose `audio` is bytes, a path, or the hub's pair of both."""
    audio = row["audio"]
    if not isinstance(audio, Mapping):
        is_path = isinstance(audio, str)
        audio = {"bytes": None if is_path else audio, "path": audio if is_path else None}
    if not {"bytes", "path"} <= audio.keys():
        return clips.from_row(row, "", column, refused="its audio is neither bytes nor a path")
    content, path = audio["bytes"], audio["path"]
    named = path or row.get("path")
    id = named if isinstance(named, str) else ""
    if not clips.is_inside(id) or "://" in id:
        id = pathlib.PurePosixPath(id).name
    if isinstance(content, bytes):
        return clips.from_row(row, id, column, audio_bytes=content)
    if not path:
        return clips.from_row(row, id, column, refused="neither audio bytes nor a path")
    if folder is None:
        return clips.from_row(row, id, column, audio=path)
    if not clips.is_inside(path):
        return clips.from_row(row, id, column, refused=f"the path {path!r} leads out of the folder")
    return clips.from_row(row, id, column, audio=str(folder / path))


def dataset(name: str, column: str, language: str) -> clips.Source:
    """A dataset of the hub or a local one, streamed; or a folder that `save_to_disk` wrote.

    Args:
        name: NAME or NAME:CONFIG, where NAME may be a local folder.
        column: the column of the transcript.
        language: its language; a column `locale` with another one causes a warning.

    Raises:
        errors.DataError: it cannot be opened or lacks a column.
    """
    import datasets

    name, _, config = name.partition(":")
    if not name:  # which would be the current folder
        raise errors.DataError("data.source hf: names no dataset: write hf:NAME or hf:NAME:CONFIG")
    folder = pathlib.Path(os.path.expanduser(name))
    unreachable = None
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
            if not isinstance(loaded, Mapping):
                loaded = {str(loaded.split or "train"): loaded}
            release = folder.name
        else:
            if not folder.exists():
                unreachable = _unreachable(name)
            with _offline(unreachable is not None):
                source = str(folder) if folder.exists() else name
                builder = datasets.load_dataset_builder(source, config or None)
                loaded = builder.as_streaming_dataset()
            called = folder.resolve().name if folder.exists() else name
            release = f"{called}@{builder.hash}" if builder.hash else called
    # ImportError: some kinds of dataset need more packages than `datasets`.
    except (
        datasets.exceptions.DatasetsError,
        OSError,
        ValueError,
        RuntimeError,
        ImportError,
    ) as error:
        if unreachable is not None:
            raise errors.DataError(
                f"hf:{name} is neither a folder here nor in the cache of `datasets`, and the hub"
                f" cannot be reached ({unreachable}). Connect, or run `hf download {name}"
                " --repo-type dataset --local-dir FOLDER` elsewhere and give hf:FOLDER"
            ) from None
        raise errors.DataError(f"hf:{name}: cannot be opened: {error}") from None
    for split, table in loaded.items():
        # A stream of CSV or JSON lines has no column names before its first row.
        columns = list(table.column_names or next(iter(table), {}))
        tables.need(f"hf:{name}, split {split}", columns, ("audio", column))
    readers = {}
    for split, table in loaded.items():
        if isinstance(table, datasets.IterableDataset):
            # Rows as they are stored: casting them to the types would need torchcodec.
            table.info.features = None
        elif isinstance(table.features["audio"], datasets.Audio):
            table = table.cast_column("audio", datasets.Audio(decode=False))
        readers[str(split)] = functools.partial(
            _hub_clips, f"hf:{name}", split, table, column, language
        )
    return clips.Source(f"hf:{name}", release, readers)


def _unreachable(name: str) -> str | None:
    """Why the hub cannot be reached; None if it answers, whatever the answer.

    Without a network `datasets` would try for 23 seconds, or for minutes if packets are dropped,
    before it uses its cache. A slow, overloaded or interrupted answer is left to its retries.
    """
    import huggingface_hub
    from huggingface_hub import errors as hub

    why = None
    for pause in _PAUSES_SECONDS:
        time.sleep(pause)
        try:
            huggingface_hub.HfApi().dataset_info(name, expand=["sha"], timeout=_PATIENCE_SECONDS)
        except hub.OfflineModeIsEnabled as error:
            return str(error).rstrip(".")
        except (hub.HTTPError, OSError, ValueError) as error:
            # By name, as its library has changed between versions of the hub's client.
            if type(error).__name__ not in ("ConnectError", "ConnectTimeout"):
                return None
            why = str(error) or type(error).__name__
        else:
            return None
    return why


@contextlib.contextmanager
def _offline(is_so: bool) -> Iterator[None]:
    """Makes `datasets` use its cache without asking the hub, if `is_so`."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or is_so
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def fingerprint(name: str) -> str:
    """Identifies the version of a local dataset; for one on the hub, its name.

    Args:
        name: as for `dataset`.
    """
    folder = pathlib.Path(os.path.expanduser(name.partition(":")[0]))
    if not folder.is_dir():
        return f"hf:{name}"
    # Strings instead of Path objects: there may be a million recordings.
    tables_there = sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if name.endswith(_TABLES) and not name.startswith((".", "cache-"))
    )
    found = [
        (os.path.relpath(file, folder), *_size_and_tail(file))
        for file in tables_there
        if os.path.isfile(file)
    ]
    return hashlib.sha256(json.dumps(found).encode("utf-8", "surrogatepass")).hexdigest()


def _size_and_tail(file: str) -> tuple[int, str]:
    """Size, and a hash of the end: all of a small table, the statistics of a parquet file."""
    with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _TAIL_BYTES))
        return size, hashlib.sha256(stream.read()).hexdigest()


def _hub_clips(
    name: str, split: str, table: Any, column: str, language: str
) -> Iterator[clips.Clip]:
    import datasets
    import fsspec

    unique, locales = _Unique(split), tables.Locales(f"{name}, split {split}", language, "row")
    try:
        for number, row in enumerate(table):
            locales.check(number, row)
            clip = unique(_record(row, column, None))
            if clip.audio is not None and "://" in clip.audio:
                with fsspec.open(clip.audio, "rb") as stream:
                    content = stream.read(clips.MOST_BYTES + 1)
                clip = dataclasses.replace(clip, audio=None, audio_bytes=content)
                if len(content) > clips.MOST_BYTES:
                    clip = dataclasses.replace(
                        clip,
                        audio_bytes=None,
                        refused=f"over {clips.MOST_BYTES} bytes are too many for a clip",
                    )
            yield clip
    except (datasets.exceptions.DatasetsError, OSError, ValueError, ImportError) as error:
        raise errors.DataError(f"{name}, split {split}: reading stopped: {error}") from None
