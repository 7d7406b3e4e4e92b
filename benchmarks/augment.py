"""CPU time that augmentation takes.

    python benchmarks/augment.py [--clips 96] [--json FILE]

Clips of noise with the lengths of Common Voice zh-HK, each knob alone and all of them, by one
thread; median over batches of 16 clips, processor time and not the clock's. The loader works ahead
on as many threads as `data.num_workers`: an update waits only where its clips' time, divided by
the cores, is more than its arithmetic takes.
"""

import argparse
import json
import statistics
import tempfile
import time

import numpy as np

from flax_asr import config, vocabulary
from flax_asr.data import augment, buckets, examples, shard_writer, shards

BATCH = 16
KNOBS = {
    "gain_db": {"gain_db": (-6.0, 6.0)},
    "noise_snr_db": {"noise_snr_db": (10.0, 30.0)},
    "speed": {"speed": (0.9, 1.1)},
    "pitch": {"pitch": (-2.0, 2.0)},
}
KNOBS["all but pitch"] = KNOBS["gain_db"] | KNOBS["noise_snr_db"] | KNOBS["speed"]
KNOBS["all"] = KNOBS["all but pitch"] | KNOBS["pitch"]


def prepared(folder: str, clips: int) -> examples.Examples:
    rng = np.random.default_rng(0)
    samples = (np.clip(rng.gamma(9.0, 4.15 / 9.0, clips), 1.0, 10.5) * 16_000).astype(int)
    with shard_writer.ShardWriter(folder) as writer:
        for clip, count in enumerate(samples):
            pcm = np.rint(rng.normal(0, 3000, count)).astype(np.int16)
            digest = shards.pcm_digest(pcm, 1 / 32768)
            writer.add(shards.ClipFacts(str(clip), "abcdefgh"), pcm, 1 / 32768, digest)
        writer.finish(source="noise", release="none", split="train")
    return examples.build(
        [shards.PreparedSplit.open(folder)],
        normalize=str,
        vocabulary=vocabulary.Vocabulary.from_transcripts(["abcdefgh"]),
        frame_lengths=lambda lengths: (lengths - 80) // 320,
    )


def milliseconds(data: examples.Examples, settings: dict) -> float:
    """Of one clip, median over batches."""
    made = augment.Augmentation(
        config.AugmentConfig(**settings),
        data,
        seed=0,
        longest=int(data.samples.max()),
        smallest_samples=buckets.smallest_samples,
        workers=1,
    )
    made.clips(0, range(2))  # imports librosa
    times = []
    for start in range(0, len(data), BATCH):
        rows = range(start, min(start + BATCH, len(data)))
        began = time.process_time()
        made.clips(1, rows)
        times.append((time.process_time() - began) / len(rows))
    return 1e3 * statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--json", metavar="FILE", help="also write the result as an object there")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(folder, arguments.clips)
        print(f"{'knob':16s} CPU ms a clip of {data.seconds / len(data):.1f} s")
        for name, settings in KNOBS.items():
            found[name] = milliseconds(data, settings)
            print(f"{name:16s} {found[name]:8.2f}", flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
