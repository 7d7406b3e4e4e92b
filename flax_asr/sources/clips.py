"""Clips in named splits, which every kind of corpus is read into."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax_asr import errors
from flax_asr.sources import tables

# The order in which splits are listed; other tables of a release that hold clips come after them.
_SPLITS = ("train", "dev", "validation", "test", "validated", "invalidated", "other")
_RELEASE = re.compile(r"(?:cv|sps)-corpus-[\w.-]+?(?=\.tar|\.tgz|$)")
_ALIASES = {"dev": "validation", "validation": "dev"}


def names_of(split: str) -> tuple[str, ...]:
    """The names that a split may have, the given one first."""
    return (split, _ALIASES[split]) if split in _ALIASES else (split,)


# Facts and the columns that held them over the years, newest first.
FACTS = {
    "speaker": ("client_id", "speaker", "speaker_id"),
    "age": ("age",),
    "gender": ("gender",),
    "accent": ("accents", "accent"),
}


MOST_BYTES = 256 * 2**20
"""The most bytes of a clip: ten minutes of the densest MP3 take 24 MB, of 48 kHz WAV 60 MB."""


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    """One recording and the facts about it; unknown facts are empty strings.

    Attributes:
        id: its file name, or its position in the source: unique, and the same in every run.
        sentence: the transcript as written.
        audio: the path of the audio file; None if its content is given.
        audio_bytes: the content of the audio file; None if its path is given.
        refused: why the clip cannot be used, if the source itself shows it; then there is neither
            path nor content.
    """

    id: str
    sentence: str
    audio: str | None = None
    audio_bytes: bytes | None = None
    speaker: str = ""
    age: str = ""
    gender: str = ""
    accent: str = ""
    refused: str = ""

    @property
    def recording(self) -> str | bytes | None:
        """The audio file's path or its content, for a decoder."""
        return self.audio if self.audio_bytes is None else self.audio_bytes


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus: named splits that can be read any number of times, always in the same order.

    Attributes:
        name: its place, for messages and reports.
        release: the name of the release, as far as paths tell.
        readers: for each split a function that returns a new iterator.

    Raises:
        errors.DataError: two splits differ in case only; one would be used, the other not.
    """

    name: str
    release: str
    readers: Mapping[str, Callable[[], Iterator[Clip]]]

    def __post_init__(self):
        spelt: dict[str, str] = {}
        for split in self.readers:
            if (other := spelt.setdefault(split.casefold(), split)) != split:
                raise errors.DataError(
                    f"{self.name}: has a split {other!r} and a split {split!r}: if they are one,"
                    " write it alike; if not, give them other names"
                )

    def splits(self) -> tuple[str, ...]:
        """The names of the splits, train first."""
        known = [split for split in _SPLITS if split in self.readers]
        return (*known, *sorted(set(self.readers) - set(known)))

    def read(self, split: str) -> Iterator[Clip]:
        """The clips of a split. "dev" and "validation" are two names of one split.

        Raises:
            errors.DataError: there is no such split, or it has no clips.
        """
        found = next((name for name in names_of(split) if name in self.readers), None)
        if found is None:
            # `datasets` writes several splits, and parts of one, in one name.
            hint = ""
            if re.search(r"[+\[]", split):
                hint = (
                    ". Several splits are written a,b; data.max_train_clips and"
                    " data.max_eval_clips take a part of one"
                )
            raise errors.DataError(
                f"{self.name}: no split {split!r}; it has {', '.join(self.splits())}."
                " data.train_splits, data.eval_splits and data.test_splits say which are used; []"
                f" is none{hint}"
            )
        return self._clips(found)

    def _clips(self, split: str) -> Iterator[Clip]:
        empty = True
        for clip in self.readers[split]():
            empty = False
            yield clip
        if empty:
            raise errors.DataError(f"{self.name}: the split {split!r} has no clips")


def from_row(row: Mapping[str, Any], id: str, column: str, **audio: Any) -> Clip:
    """A clip from a row's columns; refused if its sentence is not a string."""
    sentence = row.get(column)
    facts = {}
    for fact, columns in FACTS.items():
        values = (row[name] for name in columns if name in row)
        facts[fact] = next((str(value) for value in values if value not in (None, "")), "")
    if tables.EXTRA in row:
        audio = {"refused": str(row[tables.EXTRA])}
    elif not isinstance(sentence, str):
        # pandas writes NaN, which does not equal itself, for a missing sentence.
        if sentence is not None and sentence == sentence and not audio.get("refused"):
            kind = type(sentence).__name__
            audio = {
                "refused": f"its transcript is {sentence!r:.40}: {kind}, where text is expected"
            }
        sentence = ""
    return Clip(id, sentence, **audio, **facts)


def of_release(number: int, row: Mapping[str, Any], column: str) -> Clip:
    """A row of a release as a clip without audio; its id is the path among the recordings."""
    name = str(row.get("path", ""))
    if not is_inside(name):
        why = f"the path {name!r} leads out of the release" if name else "the row has no path"
        return from_row(row, name or f"line {number}", column, refused=why)
    # The first releases left the extension out.
    id = name if pathlib.PurePosixPath(name).suffix else name + ".mp3"
    return from_row(row, id, column)


def is_inside(name: str) -> bool:
    """Whether a relative path stays under the folder it is relative to."""
    parts = pathlib.PurePosixPath(name.replace("\\", "/")).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and "\0" not in name


def release_name(path: pathlib.PurePath) -> str:
    """The part of a path that names a release of Common Voice, else the last part."""
    for part in reversed(path.parts):
        if found := _RELEASE.search(part):
            return found.group()
    return path.name


def release_number(path: pathlib.PurePath) -> tuple[int, ...]:
    """A sort key for releases, the oldest first: 4 comes before 25.0."""
    return tuple(map(int, re.findall(r"\d+", release_name(path))))
