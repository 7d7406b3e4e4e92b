"""A Common Voice release in a folder, of scripted or spontaneous speech."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator

from flax_asr import errors
from flax_asr.sources import clips, scripted, spontaneous, tables


def source(path: pathlib.Path, language: str, text_column: str | None) -> clips.Source:
    """The release in this folder or below it.

    Args:
        path: the folder of a language, or one above it.
        language: the language to read.
        text_column: the column of the transcript; None for the usual one.

    Raises:
        errors.DataError: it is not a release, lacks the language, or is incomplete.
    """
    folders = scripted.folders_of(path, language)
    folder = next((folder for folder in folders if scripted.tables_of(folder)), None)
    if folder is not None:
        return _scripted(folder, text_column or scripted.TEXT_COLUMN, language)
    spoken = spontaneous.tables_below(path)
    if language in spoken:
        return _spontaneous(spoken[language], text_column or spontaneous.TEXT_COLUMN)
    raise _is_not_there(path, language, spoken)


def table_of(release: pathlib.Path, language: str, split: str) -> pathlib.Path | None:
    """The table of a split in a release's folder, under either of its names."""
    folders = [f for f in scripted.folders_of(release, language) if scripted.tables_of(f)]
    if not folders:
        return spontaneous.tables_below(release).get(language)
    files = (folder / f"{name}.tsv" for folder in folders for name in clips.names_of(split))
    return next((file for file in files if file.is_file()), None)


def _is_not_there(path: pathlib.Path, language: str, spoken: Iterable[str]) -> errors.DataError:
    """An error that says what the folder holds, and what to write if it is another source."""
    below = [*path.iterdir(), *path.glob("cv-corpus-*/*")]
    languages = sorted({*(child.name for child in below if scripted.tables_of(child)), *spoken})
    if languages:
        known = ", ".join(map(repr, languages[:40]))
        return errors.DataError(f"{path}: a release without {language!r}; it has {known}")
    held = {child.name for child in path.iterdir()}
    hint = ""
    if any(name.endswith(".parquet") for name in held):
        hint = f"; for parquet files write parquet:{path}/*.parquet"
    elif {"dataset_dict.json", "state.json"} & held:
        hint = f"; for a saved dataset write hf:{path}"
    return errors.DataError(
        f"{path}: no train.tsv here or in {language}/, so this is not a Common Voice release{hint}"
    )


def _scripted(folder: pathlib.Path, column: str, language: str) -> clips.Source:
    recordings = _recordings(folder, scripted.RECORDINGS)
    readers = {
        split: functools.partial(
            _clips,
            functools.partial(_scripted_rows, file, column, language),
            recordings,
            column,
        )
        for split, file in scripted.tables_of(folder).items()
    }
    return clips.Source(str(folder), clips.release_name(folder), readers)


def _spontaneous(file: pathlib.Path, column: str) -> clips.Source:
    recordings = _recordings(file.parent, spontaneous.RECORDINGS)
    with tables.opened(file) as stream:
        names = spontaneous.splits(stream, str(file), column)
    readers = {
        split: functools.partial(
            _clips,
            functools.partial(_spontaneous_rows, file, column, split),
            recordings,
            scripted.TEXT_COLUMN,
        )
        for split in names
    }
    return clips.Source(str(file.parent), clips.release_name(file.parent), readers)


def _recordings(folder: pathlib.Path, name: str) -> pathlib.Path:
    if not (folder / name).is_dir():
        raise errors.DataError(
            f"{folder}: has tables, but no folder {name}/; unpack all of it (for"
            " recordings of your own, name the table itself)"
        )
    return folder / name


def _scripted_rows(file: pathlib.Path, column: str, language: str) -> Iterator[tables.Row]:
    with tables.opened(file) as stream:
        yield from scripted.rows(stream, str(file), column, language)


def _spontaneous_rows(file: pathlib.Path, column: str, split: str) -> Iterator[tables.Row]:
    with tables.opened(file) as stream:
        yield from spontaneous.rows(stream, str(file), column, split)


def _clips(
    rows: Callable[[], Iterator[tables.Row]], recordings: pathlib.Path, column: str
) -> Iterator[clips.Clip]:
    for number, row in rows():
        clip = clips.of_release(number, row, column)
        path = None if clip.refused else str(recordings / clip.id)
        yield dataclasses.replace(clip, audio=path)
