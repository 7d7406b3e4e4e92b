"""The frozen layers' output for each training clip, stored on disk and read by memory maps.

A finished folder holds

    part-00000.bin ...   the frames of some clips one after the other, in the run's precision
    about.json           what it was made from, for people
    seal.json            size and sha256 of every file; written last

The clips are sorted by length and divided into parts of a few dozen megabytes. A part gets its name
when it is complete on disk, so an interruption loses only the part in progress.
"""

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Int, Shaped

from flax_asr import atomic, errors, seals

logger = logging.getLogger(__name__)

PREFIX = "features-"
PART_BYTES = 64 * 2**20


class Features:
    """The cached frames of every row of some examples.

    Args:
        folder: the folder, whose name must identify everything that the frames depend on.
        samples: length of each row at 16 kHz.
        frame_lengths: converts samples to frames.
        width: numbers in a frame.
        dtype: type of the numbers; may be ml_dtypes' bfloat16.

    Attributes:
        bytes: size on disk.
        parts: the rows of each part.
    """

    def __init__(
        self,
        folder: Path,
        samples: Int[np.ndarray, " rows"],
        frame_lengths: Callable[[Any], Any],
        width: int,
        dtype: npt.DTypeLike,
    ) -> None:
        self.folder = folder
        self._frame_lengths = frame_lengths
        self._frames = frame_lengths(samples.astype(np.int64))
        self._width, self._dtype = width, np.dtype(dtype)
        sizes = self._frames * width * self._dtype.itemsize
        self.bytes = int(sizes.sum())
        order = np.argsort(samples, kind="stable")
        part_of = (np.cumsum(sizes[order]) - sizes[order]) // PART_BYTES
        self.parts = np.split(order, np.flatnonzero(np.diff(part_of)) + 1)
        self._part_of = np.empty(len(samples), np.int64)
        self._start_of = np.empty(len(samples), np.int64)
        for number, rows in enumerate(self.parts):
            self._part_of[rows] = number
            self._start_of[rows] = np.cumsum(self._frames[rows]) - self._frames[rows]
        self._maps: list[np.ndarray] = []

    def is_finished(self) -> bool:
        """Whether everything is there and undamaged; reads all of it.

        Damaged parts are logged and removed.
        """
        if not (self.folder / seals.FILE).is_file():
            return False
        try:
            seals.verify(self.folder)
        except errors.CheckpointError as error:
            logger.warning("warning: %s: the cached features are computed again", error)
            # Not the folder itself, which the computing process has locked.
            for path in self.folder.iterdir():
                path.unlink()
            return False
        return True

    def missing(self) -> Iterator[tuple[int, Int[np.ndarray, " _"]]]:
        """(Number, rows) of every missing part."""
        for number, rows in enumerate(self.parts):
            if not self._path(number).is_file():
                yield number, rows

    def write(self, number: int, frames: Sequence[Shaped[np.ndarray, "_ width"]]) -> None:
        """Writes a part: the frames of each of its rows.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        try:
            with atomic.replacing(self._path(number)) as unfinished, unfinished.open("wb") as file:
                for own in frames:
                    file.write(np.ascontiguousarray(own, self._dtype).tobytes())
        except OSError as error:
            raise self._unwritable(error) from error

    def finish(self, about: Mapping[str, Any]) -> None:
        """Seals the folder when all parts are there.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        try:
            with open(self.folder / "about.json", "w", encoding="utf-8") as file:
                json.dump(about, file, indent=1)
            seals.write(self.folder)
        except OSError as error:
            raise self._unwritable(error) from error

    def others(self) -> dict[Path, int]:
        """Folders of features with other settings beside this one, with their sizes in bytes."""
        found = sorted(self.folder.parent.glob(f"{PREFIX}*"))
        return {
            folder: sum(path.stat().st_size for path in folder.glob("part-*.bin"))
            for folder in found
            if folder != self.folder
        }

    def check_room(self) -> None:
        """Checks that the missing parts fit on the disk.

        Raises:
            DataError: they do not fit.
        """
        there = sum(path.stat().st_size for path in self.folder.glob("part-*.bin"))
        free = shutil.disk_usage(self.folder).free
        if self.bytes - there > free:
            others = "".join(
                f" {folder} holds {size / 1e9:.2f} GB of other settings: delete it if no run needs"
                " it."
                for folder, size in self.others().items()
            )
            raise errors.DataError(
                f"data.cache_features needs {(self.bytes - there) / 1e9:.2f} GB in {self.folder},"
                f" where {free / 1e9:.2f} GB are free: make room, name another data.prepared_dir,"
                f" lower data.max_train_clips, or set data.cache_features false.{others}"
            )

    def open(self) -> None:
        """Maps the parts into memory."""
        self._maps = [
            np.asarray(np.memmap(self._path(number), np.uint8, mode="r"))
            .view(self._dtype)
            .reshape(-1, self._width)
            for number in range(len(self.parts))
        ]

    def length(self, row: int) -> int:
        """Number of frames in the row."""
        return int(self._frames[row])

    def frames(self, row: int) -> Shaped[np.ndarray, "frames width"]:
        """The row's frames, a read-only view of the memory map."""
        start = self._start_of[row]
        return self._maps[self._part_of[row]][start : start + self._frames[row]]

    def padded(
        self, rows: Int[np.ndarray, " rows"], samples: int
    ) -> Shaped[np.ndarray, "rows frames width"]:
        """The frames of some rows (-1 = filler), padded with zeros for this many samples."""
        found = np.zeros((len(rows), self._frame_lengths(samples), self._width), self._dtype)
        for place, row in enumerate(rows.tolist()):
            if row >= 0:
                found[place, : self._frames[row]] = self.frames(row)
        return found

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.bin"

    def _unwritable(self, error: OSError) -> errors.DataError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return errors.DataError(
            f"{self.folder} cannot be written ({errors.why(error)}):"
            f" {'make room' if full else 'fix that'}, name another data.prepared_dir, or set"
            " data.cache_features false. What is computed is kept."
        )
