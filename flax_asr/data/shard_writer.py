"""Writes the prepared form of a split, clip by clip, and can resume after an interruption.

While a split is being prepared, it has a journal instead of the manifest: one line for each clip,
with the hash of its audio. A writer that opens such a folder keeps the clips for which journal and
audio agree.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int16, UInt8

from flax_asr import atomic, audio, seals
from flax_asr.data import shards

SHARD_BYTES = 256 * 2**20


class ShardWriter:
    """Writes a split clip by clip; a writer on an unfinished folder resumes where that stopped.

    Attributes:
        done: id and sentence of the clips that an earlier, interrupted writer recorded (kept or
            left out), in order. The next `add` or `leave_out` is about the clip after them.
        digests: `shards.pcm_digest` -> id, for every clip that was kept.
        left_out: every clip that was left out, and why.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        settings: Mapping[str, Any] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Opens the folder; starts afresh if it was begun with other `settings` (JSON values)."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.done: list[tuple[str, str]] = []
        self.digests: dict[str, str] = {}
        self.left_out: list[shards.LeftOut] = []
        self._settings = dict(settings or {})
        self._shard_bytes = shard_bytes
        self._index: dict[str, list] = {name: [] for name in shards.INDEX}
        self._hashes: list[Any] = []
        self._shard_sizes: list[int] = []
        self._replay()
        self._journal = self._journal_path.open("ab")
        self._audio = self._shard_path(len(self._hashes) - 1).open("ab") if self._hashes else None

    @property
    def clips(self) -> int:
        """Number of clips kept."""
        return len(self._index["samples"])

    @property
    def _journal_path(self) -> Path:
        return self.folder / "journal.jsonl"

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"audio-{number:05d}.bin"

    def add(
        self, facts: shards.ClipFacts, pcm: Int16[np.ndarray, " samples"], gain: float, digest: str
    ) -> None:
        """Appends a clip; `digest` is its `shards.pcm_digest`."""
        data = np.ascontiguousarray(pcm, shards.PCM).view(np.uint8)
        if self._opens_shard(len(data)):
            self._next_shard()
        self._audio.write(data)
        self._record(data, len(pcm), gain, digest, facts.id)
        line = vars(facts) | {"samples": len(pcm), "gain": gain, "digest": digest}
        self._journal.write(_line(line))

    def leave_out(self, sentence: str, left_out: shards.LeftOut) -> None:
        """Records why a clip is left out."""
        self.left_out.append(left_out)
        self._journal.write(_line({"sentence": sentence, **left_out._asdict()}))

    def flush(self) -> None:
        """Flushes what was added to the operating system, audio first."""
        if self._audio is not None:
            self._audio.flush()
        self._journal.flush()

    def finish(self, *, source: str, release: str, split: str) -> None:
        """Writes index and text, and last, atomically, the manifest."""
        self.close()
        for name, dtype in shards.INDEX.items():
            np.save(self.folder / f"{name}.npy", np.array(self._index[name], dtype))
        _write_lines(
            self.folder / "clips.jsonl",
            (
                {name: entry[name] for name in shards.FACTS}
                for entry in itertools.islice(shards.read_lines(self._journal_path), 1, None)
                if "reason" not in entry
            ),
        )
        _write_lines(self.folder / "left_out.jsonl", (entry._asdict() for entry in self.left_out))
        files = {
            self._shard_path(number).name: digest.hexdigest()
            for number, digest in enumerate(self._hashes)
        }
        for name in [f"{name}.npy" for name in shards.INDEX] + ["clips.jsonl", "left_out.jsonl"]:
            files[name] = seals.sha256(self.folder / name)
        manifest = {
            "format": shards.FORMAT,
            "source": source,
            "release": release,
            "split": split,
            "settings": self._settings,
            "clips": self.clips,
            "left_out": len(self.left_out),
            "seconds": sum(self._index["samples"]) / audio.SAMPLE_RATE_HZ,
            "hash": shards.content_hash(files),
            "files": {
                name: {"bytes": (self.folder / name).stat().st_size, "sha256": digest}
                for name, digest in files.items()
            },
        }
        manifest["checksum"] = shards.checksum(manifest)
        for name in files:
            atomic.sync(self.folder / name)
        content = json.dumps(manifest, ensure_ascii=False, indent=1)
        with atomic.replacing(self.folder / shards.MANIFEST) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
        self._journal_path.unlink()

    def discard(self) -> None:
        """Discards everything: the next writer starts afresh."""
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
        # A shard is opened for a clip, so none is empty; a very long clip gets its own.
        return not self._hashes or self._shard_sizes[-1] + clip_bytes > self._shard_bytes

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
        self._index["offsets"].append(self._shard_sizes[-1] // shards.PCM.itemsize)
        self._hashes[-1].update(data)
        self._shard_sizes[-1] += len(data)
        self.digests.setdefault(digest, clip_id)

    def _replay(self) -> None:
        """Keeps clips for which journal and audio agree, and truncates both files after them."""
        header = _line({"format": shards.FORMAT, "settings": self._settings})
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
            self.left_out.append(shards.LeftOut(*(entry[name] for name in shards.LeftOut._fields)))
        else:
            size = entry["samples"] * shards.PCM.itemsize
            opens_shard = self._opens_shard(size)
            path = self._shard_path(len(self._hashes) - (0 if opens_shard else 1))
            data = _read_bytes(path, 0 if opens_shard else self._shard_sizes[-1], size)
            if shards.pcm_digest(np.frombuffer(data, shards.PCM), entry["gain"]) != entry["digest"]:
                return False
            if opens_shard:
                self._start_hash()
            self._record(data, entry["samples"], entry["gain"], entry["digest"], entry["id"])
        self.done.append((entry["id"], entry["sentence"]))
        return True


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    with open(path, "wb") as lines:
        lines.writelines(_line(value) for value in values)


def _read_bytes(path: Path, start: int, size: int) -> bytes:
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)
