"""The prepared form of one split: int16 shards in memory maps, index arrays, text apart from audio.

A finished folder holds

    audio-00000.bin ...  the clips one after the other, int16 little endian, at 16 kHz
    samples.npy gains.npy shards.npy offsets.npy   place of each clip; float value = int16 * gain
    clips.jsonl          id, sentence (raw), speaker, age, gender, accent of each clip
    left_out.jsonl       id, reason, detail of each clip that was left out
    manifest.json        what it was made from, and size and sha256 of every file; written last
"""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int16, Int32, Int64

from flax_asr import errors, seals

FORMAT = 1
MANIFEST = "manifest.json"
PCM = np.dtype("<i2")
INDEX = {"samples": np.int32, "gains": np.float32, "shards": np.int32, "offsets": np.int64}


class LeftOut(NamedTuple):
    """A clip that is not used, and why."""

    id: str
    reason: str
    detail: str


def summary(left_out: Iterable[LeftOut]) -> str:
    """Reasons with their counts, the most frequent first."""
    counts = Counter(entry.reason for entry in left_out)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


@dataclass(frozen=True)
class ClipFacts:
    """Text and facts of a clip; "" = unknown."""

    id: str
    sentence: str
    speaker: str = ""
    age: str = ""
    gender: str = ""
    accent: str = ""


FACTS = tuple(field.name for field in dataclasses.fields(ClipFacts))


def pcm_digest(pcm: Int16[np.ndarray, " samples"], gain: float) -> str:
    """A digest of decoded audio, equal for clips that are the same bit for bit."""
    digest = hashlib.sha256(np.ascontiguousarray(pcm, PCM))
    digest.update(repr(gain).encode())
    return digest.hexdigest()


class PreparedSplit:
    """A finished folder, its audio in memory maps.

    Attributes:
        samples: length of each clip at 16 kHz.
        gains: float value of a clip = int16 value * gain.
        maps: the audio of each shard.
        shards, offsets: the shard of each clip, and its start there, in samples.
        ids, sentences, speakers, ages, genders, accents: one string per clip, "" = unknown;
            sentences are not normalised.
        hash: sha256 of the content, independent of the source's path.
        manifest: the content of manifest.json.
    """

    samples: Int32[np.ndarray, " clips"]
    gains: Float32[np.ndarray, " clips"]
    shards: Int32[np.ndarray, " clips"]
    offsets: Int64[np.ndarray, " clips"]

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Use `open`."""
        self.folder = folder
        self.manifest = manifest
        self.hash: str = manifest["hash"]
        self.split: str = manifest["split"]
        self.release: str = manifest["release"]
        self.seconds: float = manifest["seconds"]
        index = {n: np.load(folder / f"{n}.npy", allow_pickle=False) for n in INDEX}
        self.samples = index["samples"]
        self.gains = index["gains"]
        self.shards = index["shards"]
        self.offsets = index["offsets"]
        self.maps = [
            # A plain view of the map, as slicing np.memmap itself costs ten times as much.
            np.asarray(np.memmap(folder / name, PCM, mode="r"))
            for name in self.audio_files
        ]
        facts = list(read_lines(folder / "clips.jsonl"))
        self.ids = [fact["id"] for fact in facts]
        self.sentences = [fact["sentence"] for fact in facts]
        self.speakers = [fact["speaker"] for fact in facts]
        self.ages = [fact["age"] for fact in facts]
        self.genders = [fact["gender"] for fact in facts]
        self.accents = [fact["accent"] for fact in facts]
        self.left_out = [LeftOut(**entry) for entry in read_lines(folder / "left_out.jsonl")]

    @property
    def audio_files(self) -> list[str]:
        """Names of the audio files, in the order of the clips."""
        return [name for name in self.manifest["files"] if _is_audio(name)]

    def verify(self, name: str) -> None:
        """Reads a file and compares its hash with the manifest's.

        Raises:
            errors.DataError: the file is damaged, or cannot be read.
        """
        _verify(self.folder / name, self.manifest["files"][name]["sha256"])

    @classmethod
    def open(cls, folder: str | os.PathLike, *, verify: bool = False) -> "PreparedSplit":
        """Opens a finished folder.

        Sizes of all files and hashes of all but the audio are always checked.

        Args:
            folder: a folder written by `shard_writer.ShardWriter`.
            verify: check the hashes of the audio too, which reads all of it.

        Raises:
            errors.DataError: there is no such folder, it is unfinished or has another format, or
                a file is damaged.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        for name, expected in manifest["files"].items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != expected["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise _damaged(path, f"{found}; the manifest says {expected['bytes']} bytes")
            if verify or not _is_audio(name):
                _verify(path, expected["sha256"])
        return cls(folder, manifest)

    def __len__(self) -> int:
        return len(self.samples)

    def audio(self, row: int) -> Int16[np.ndarray, " samples"]:
        """The clip's samples, a read-only view of the memory map."""
        start = self.offsets[row]
        return self.maps[self.shards[row]][start : start + self.samples[row]]


def _is_audio(name: str) -> bool:
    return name.startswith("audio-")


def _verify(path: Path, sha256: str) -> None:
    try:
        digest = seals.sha256(path)
    except OSError as error:
        raise _damaged(path, f"cannot be read: {errors.why(error)}") from error
    if digest != sha256:
        raise _damaged(path, "is not what was written: its sha256 differs")


def is_finished(folder: str | os.PathLike) -> bool:
    """Whether the folder has a manifest, sound or not."""
    return (Path(folder) / MANIFEST).exists()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise errors.DataError(
            f"{folder} is not a finished prepared split (it has no manifest.json):"
            " run `flax-asr prepare` with the same configuration."
        ) from error
    except ValueError as error:
        raise _damaged(path, "is not JSON") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise _damaged(path, "is not a manifest")
    if manifest["format"] != FORMAT:
        raise errors.DataError(
            f"{folder} was prepared in format {manifest['format']}, this version reads format"
            f" {FORMAT}: delete the folder and run `flax-asr prepare` again."
        )
    if manifest.pop("checksum", None) != checksum(manifest):
        raise _damaged(path, "is not what was written: its checksum differs")
    return manifest


def _damaged(path: Path, what: str) -> errors.DataError:
    return errors.DataError(
        f"{path} {what}. Delete the folder {path.parent} and run `flax-asr prepare` again."
    )


def content_hash(files: Mapping[str, str]) -> str:
    """Hash of a split's content, from the sha256 of its files by name; ignores left_out.jsonl."""
    content = [f"{name} {digest}" for name, digest in files.items() if name != "left_out.jsonl"]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def checksum(manifest: Mapping[str, Any]) -> str:
    """Checksum of a manifest's content."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a JSON-lines file of this format."""
    with open(path, "rb") as lines:
        for line in lines:
            yield json.loads(line)
