"""Small prepared splits with known content, written by the real writer."""

from pathlib import Path

import numpy as np

from flax_asr.data.shard_writer import ShardWriter
from flax_asr.data.shards import ClipFacts, LeftOut, PreparedSplit, pcm_digest


def noise(samples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-32767, 32768, samples).astype(np.int16)


def add(writer: ShardWriter, facts: ClipFacts, pcm: np.ndarray, gain: float = 1e-4) -> None:
    gain = float(np.float32(gain))
    writer.add(facts, pcm, gain, pcm_digest(pcm, gain))


def write_split(
    folder: Path,
    sentences: list[str],
    *,
    samples: list[int] | None = None,
    speakers: list[str] | None = None,
    ids: list[str] | None = None,
    split: str = "train",
    shard_bytes: int = 100_000,
) -> PreparedSplit:
    """One clip of noise for each sentence; clip i is `noise(samples[i], i)`."""
    with ShardWriter(folder, shard_bytes=shard_bytes) as writer:
        for i, sentence in enumerate(sentences):
            facts = ClipFacts(
                id=ids[i] if ids else f"{split}-{i}.mp3",
                sentence=sentence,
                speaker=speakers[i] if speakers else f"speaker-{i % 3}",
                age="twenties",
                gender="",
                accent="出生地：香港",
            )
            add(writer, facts, noise(samples[i] if samples else 4000 + 1000 * i, i), 1e-4 * (i + 1))
        writer.leave_out("壞", LeftOut("bad.mp3", "damaged", "cut"))
        writer.finish(source="synthetic", release="cv-0", split=split)
    return PreparedSplit.open(folder)
