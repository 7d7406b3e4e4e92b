"""The prepared form of one split: int16 shards in memory maps, index arrays, text apart from audio.

A finished folder holds

    audio-00000.bin ...  the clips one after the other, int16 little endian, at 16 kHz
    samples.npy gains.npy shards.npy offsets.npy   where each clip lies; float value = int16 * gain
    clips.jsonl          id, sentence (raw), speaker, age, gender, accent of each clip
    left_out.jsonl       id, reason, detail of each clip that is not there
    manifest.json        what it was made from, and size and sha256 of every file; written last

While a split is being prepared, its journal takes the place of the manifest: one line for each
clip, with the hash of its audio. A writer that opens such a folder keeps what the journal and the
audio agree on.
"""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int16, Int32, Int64, UInt8

from flax_asr import audio, errors

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_BYTES = 256 * 2**20
_PCM = np.dtype("<i2")
_INDEX = {"samples": np.int32, "gains": np.float32, "shards": np.int32, "offsets": np.int64}
_FACTS = ("id", "sentence", "speaker", "age", "gender", "accent")


class LeftOut(NamedTuple):
    """A clip that is not used, and why."""

    id: str
    reason: str
    detail: str


def summary(left_out: Iterable[LeftOut]) -> str:
    """Reasons with their counts, the commonest first."""
    counts = Counter(entry.reason for entry in left_out)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


@dataclass(frozen=True)
class ClipFacts:
    """What is kept of a clip besides its audio; "" = unknown."""

    id: str
    sentence: str
    speaker: str = ""
    age: str = ""
    gender: str = ""
    accent: str = ""


def pcm_digest(pcm: Int16[np.ndarray, " samples"], gain: float) -> str:
    """Names the decoded audio: equal for clips that sound bit for bit the same."""
    digest = hashlib.sha256(np.ascontiguousarray(pcm, _PCM))
    digest.update(repr(gain).encode())
    return digest.hexdigest()


class ShardWriter:
    """Writes a split clip by clip; a writer on an unfinished folder goes on where it stopped.

    Attributes:
        done: id and sentence of the clips that an earlier, interrupted writer recorded (kept or
            left out), in order. The next `add` or `leave_out` is about the clip after them.
        digests: `pcm_digest` -> id of every clip kept.
        left_out: every clip that is not kept, and why.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        settings: Mapping[str, Any] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Opens the folder; what was begun with other `settings` (JSON values) starts afresh."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.done: list[tuple[str, str]] = []
        self.digests: dict[str, str] = {}
        self.left_out: list[LeftOut] = []
        self._settings = dict(settings or {})
        self._shard_bytes = shard_bytes
        self._index: dict[str, list] = {name: [] for name in _INDEX}
        self._hashes: list[Any] = []
        self._shard_sizes: list[int] = []
        self._replay()
        self._journal = self._journal_path.open("ab")
        self._audio = self._shard_path(len(self._hashes) - 1).open("ab") if self._hashes else None

    @property
    def clips(self) -> int:
        """How many are kept."""
        return len(self._index["samples"])

    @property
    def _journal_path(self) -> Path:
        return self.folder / "journal.jsonl"

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"audio-{number:05d}.bin"

    def add(
        self, facts: ClipFacts, pcm: Int16[np.ndarray, " samples"], gain: float, digest: str
    ) -> None:
        """Appends a clip; `digest` is its `pcm_digest`."""
        data = np.ascontiguousarray(pcm, _PCM).view(np.uint8)
        if self._opens_shard(len(data)):
            self._next_shard()
        self._audio.write(data)
        self._record(data, len(pcm), gain, digest, facts.id)
        line = asdict(facts) | {"samples": len(pcm), "gain": gain, "digest": digest}
        self._journal.write(_line(line))

    def leave_out(self, sentence: str, left_out: LeftOut) -> None:
        """Records why a clip is not kept."""
        self.left_out.append(left_out)
        self._journal.write(_line({"sentence": sentence, **left_out._asdict()}))

    def flush(self) -> None:
        """Hands what was added to the operating system, audio first."""
        if self._audio is not None:
            self._audio.flush()
        self._journal.flush()

    def finish(self, *, source: str, release: str, split: str) -> None:
        """Writes index, text and, last and atomically, the manifest."""
        self.close()
        for name, dtype in _INDEX.items():
            np.save(self.folder / f"{name}.npy", np.array(self._index[name], dtype))
        _write_lines(
            self.folder / "clips.jsonl",
            (
                {name: entry[name] for name in _FACTS}
                for entry in itertools.islice(_read_lines(self._journal_path), 1, None)
                if "reason" not in entry
            ),
        )
        _write_lines(self.folder / "left_out.jsonl", (entry._asdict() for entry in self.left_out))
        files = {
            self._shard_path(number).name: digest.hexdigest()
            for number, digest in enumerate(self._hashes)
        }
        for name in [f"{name}.npy" for name in _INDEX] + ["clips.jsonl", "left_out.jsonl"]:
            files[name] = _file_sha256(self.folder / name)
        manifest = {
            "format": FORMAT,
            "source": source,
            "release": release,
            "split": split,
            "settings": self._settings,
            "clips": self.clips,
            "left_out": len(self.left_out),
            "seconds": sum(self._index["samples"]) / audio.SAMPLE_RATE_HZ,
            "hash": _content_hash(files),
            "files": {
                name: {"bytes": (self.folder / name).stat().st_size, "sha256": digest}
                for name, digest in files.items()
            },
        }
        manifest["checksum"] = _checksum(manifest)
        for name in files:
            _sync(self.folder / name)
        unfinished = self.folder / f"{MANIFEST}.tmp"
        unfinished.write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
        _sync(unfinished)
        unfinished.replace(self.folder / MANIFEST)
        _sync(self.folder)
        self._journal_path.unlink()

    def discard(self) -> None:
        """Forgets everything: the next writer starts afresh."""
        self.close()
        for path in [self._journal_path, *self.folder.glob("audio-*.bin")]:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the files; what was added is kept for the next writer."""
        if self._audio is not None:
            self._audio.close()
        self._journal.close()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _opens_shard(self, clip_bytes: int) -> bool:
        if not self._hashes:
            return True
        size = self._shard_sizes[-1]
        return size > 0 and size + clip_bytes > self._shard_bytes

    def _next_shard(self) -> None:
        if self._audio is not None:
            self._audio.close()
        self._audio = self._shard_path(len(self._hashes)).open("wb")
        self._start_hash()

    def _start_hash(self) -> None:
        self._hashes.append(hashlib.sha256())
        self._shard_sizes.append(0)

    def _record(
        self,
        data: bytes | UInt8[np.ndarray, " bytes"],
        samples: int,
        gain: float,
        digest: str,
        clip_id: str,
    ) -> None:
        self._index["samples"].append(samples)
        self._index["gains"].append(gain)
        self._index["shards"].append(len(self._hashes) - 1)
        self._index["offsets"].append(self._shard_sizes[-1] // _PCM.itemsize)
        self._hashes[-1].update(data)
        self._shard_sizes[-1] += len(data)
        self.digests.setdefault(digest, clip_id)

    def _replay(self) -> None:
        """Takes over what journal and audio agree on, and cuts both files behind it."""
        header = _line({"format": FORMAT, "settings": self._settings})
        good_bytes = 0
        if self._journal_path.exists():
            with open(self._journal_path, "rb") as journal:
                if journal.readline() == header:
                    good_bytes = len(header)
                    for line in journal:
                        if not line.endswith(b"\n") or not self._replay_line(line):
                            break
                        good_bytes += len(line)
        if not good_bytes:
            self._journal_path.write_bytes(header)
        else:
            os.truncate(self._journal_path, good_bytes)
        for path in self.folder.glob("audio-*.bin"):
            number = int(path.stem.removeprefix("audio-"))
            if number < len(self._hashes):
                os.truncate(path, self._shard_sizes[number])
            else:
                path.unlink()

    def _replay_line(self, line: bytes) -> bool:
        try:
            entry = json.loads(line)
        except ValueError:  # cut off in the middle by a kill or a full disk
            return False
        if "reason" in entry:
            self.left_out.append(LeftOut(*(entry[name] for name in LeftOut._fields)))
        else:
            size = entry["samples"] * _PCM.itemsize
            opens_shard = self._opens_shard(size)
            path = self._shard_path(len(self._hashes) - (0 if opens_shard else 1))
            data = _read_bytes(path, 0 if opens_shard else self._shard_sizes[-1], size)
            if pcm_digest(np.frombuffer(data, _PCM), entry["gain"]) != entry["digest"]:
                return False
            if opens_shard:
                self._start_hash()
            self._record(data, entry["samples"], entry["gain"], entry["digest"], entry["id"])
        self.done.append((entry["id"], entry["sentence"]))
        return True


class PreparedSplit:
    """A finished folder, its audio in memory maps.

    Attributes:
        samples: length of each clip at 16 kHz.
        gains: float value of a clip = int16 value * gain.
        ids, sentences, speakers, ages, genders, accents: one string a clip, "" = unknown; sentences
            are as the source has them.
        hash: sha256 of the content, whatever the source's place or name.
        manifest: everything that manifest.json says.
    """

    samples: Int32[np.ndarray, " clips"]
    gains: Float32[np.ndarray, " clips"]

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Use `open`."""
        self.folder = folder
        self.manifest = manifest
        self.hash: str = manifest["hash"]
        self.split: str = manifest["split"]
        self.release: str = manifest["release"]
        self.seconds: float = manifest["seconds"]
        index = {n: np.load(folder / f"{n}.npy", allow_pickle=False) for n in _INDEX}
        self.samples = index["samples"]
        self.gains = index["gains"]
        self._shard_of: Int32[np.ndarray, " clips"] = index["shards"]
        self._offset_of: Int64[np.ndarray, " clips"] = index["offsets"]
        self._maps = [
            # A plain view of the map: slicing np.memmap itself costs ten times as much.
            np.asarray(np.memmap(folder / name, _PCM, mode="r"))
            for name in manifest["files"]
            if name.startswith("audio-")
        ]
        facts = list(_read_lines(folder / "clips.jsonl"))
        self.ids = [fact["id"] for fact in facts]
        self.sentences = [fact["sentence"] for fact in facts]
        self.speakers = [fact["speaker"] for fact in facts]
        self.ages = [fact["age"] for fact in facts]
        self.genders = [fact["gender"] for fact in facts]
        self.accents = [fact["accent"] for fact in facts]
        self.left_out = [LeftOut(**entry) for entry in _read_lines(folder / "left_out.jsonl")]

    @classmethod
    def open(cls, folder: str | os.PathLike, *, verify: bool = False) -> "PreparedSplit":
        """Opens a finished folder.

        Sizes of all files and hashes of all but the audio are always checked.

        Args:
            folder: written by `ShardWriter`.
            verify: check the hashes of the audio too (it is read once).

        Raises:
            errors.DataError: no such folder, not finished, another format, or a file is damaged.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        for name, expected in manifest["files"].items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != expected["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise _damaged(path, f"{found}; the manifest says {expected['bytes']} bytes")
            is_audio = name.startswith("audio-")
            if (verify or not is_audio) and _file_sha256(path) != expected["sha256"]:
                raise _damaged(path, "is not what was written: its sha256 differs")
        return cls(folder, manifest)

    def __len__(self) -> int:
        return len(self.samples)

    def audio(self, row: int) -> Int16[np.ndarray, " samples"]:
        """The clip's samples, read only, straight from the memory map."""
        start = self._offset_of[row]
        return self._maps[self._shard_of[row]][start : start + self.samples[row]]


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
    if manifest.pop("checksum", None) != _checksum(manifest):
        raise _damaged(path, "is not what was written: its checksum differs")
    return manifest


def _damaged(path: Path, what: str) -> errors.DataError:
    return errors.DataError(
        f"{path} {what}. Delete the folder {path.parent} and run `flax-asr prepare` again."
    )


def _content_hash(files: Mapping[str, str]) -> str:
    content = [f"{name} {digest}" for name, digest in files.items() if name != "left_out.jsonl"]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as lines:
        for line in lines:
            yield json.loads(line)


def _write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    with open(path, "wb") as lines:
        lines.writelines(_line(value) for value in values)


def _read_bytes(path: Path, start: int, size: int) -> bytes:
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
