"""Time to assemble a batch of 32 clips on one core, against Hugging Face's ways.

    python benchmarks/loader.py [--runs 20] [--json FILE]

256 clips of noise with the lengths of Common Voice zh-HK. `collator`: a mapped dataset of floats,
torch's DataLoader and the padding collator of Hugging Face's CTC example. `numpy rows`: the same
dataset in numpy format, padded by their feature extractor; `numpy by hand`: padded in numpy, as
nobody but this script does. `ours`: int16 from the memory maps, gain and normalisation left to the
device. The same rows in the same batches, each way one batch after the other as a training loop
would, medians of processor time over batches; no threads.
"""

import argparse
import os
import statistics
import tempfile
import time

# Before any of the libraries starts its threads.
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import sidebyside  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from flax_asr import vocabulary  # noqa: E402
from flax_asr.data import buckets, examples, loader, shard_writer, shards  # noqa: E402

CLIPS, BATCH = 256, 32


def prepared(folder: str) -> examples.Examples:
    rng = np.random.default_rng(0)
    samples = (np.clip(rng.gamma(9.0, 4.15 / 9.0, CLIPS), 1.0, 10.5) * 16_000).astype(int)
    with shard_writer.ShardWriter(folder) as writer:
        for clip, count in enumerate(samples):
            pcm = rng.integers(-32767, 32768, count).astype(np.int16)
            sentence = "".join(rng.choice(list("abcdefghijklmnopqrst"), 12))
            digest = shards.pcm_digest(pcm, 1 / 32768)
            writer.add(shards.ClipFacts(str(clip), sentence), pcm, 1 / 32768, digest)
        writer.finish(source="noise", release="none", split="train")
    split = shards.PreparedSplit.open(folder)
    return examples.build(
        [split],
        normalize=str,
        vocabulary=vocabulary.Vocabulary.from_transcripts(split.sentences),
        frame_lengths=lambda lengths: (lengths - 80) // 320,
    )


EXTRACTOR = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)


def padded(rows, tensors: str):
    inputs = [{"input_values": row["input_values"]} for row in rows]
    return EXTRACTOR.pad(inputs, padding=True, return_tensors=tensors)


def collate(rows):
    """As in the example script: inputs and labels are padded to the longest of the batch."""
    batch = padded(rows, "pt")
    labels = [torch.tensor(row["labels"]) for row in rows]
    batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, True, -100)
    return batch


def numpy_labels(rows):
    labels = np.full((len(rows), max(len(row["labels"]) for row in rows)), -100)
    for place, row in enumerate(rows):
        labels[place, : len(row["labels"])] = row["labels"]
    return labels


def numpy_rows(rows):
    return {**padded(rows, "np"), "labels": numpy_labels(rows)}


def numpy_by_hand(rows):
    inputs = np.zeros((len(rows), max(len(row["input_values"]) for row in rows)), np.float32)
    for place, row in enumerate(rows):
        inputs[place, : len(row["input_values"])] = row["input_values"]
    return inputs, numpy_labels(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", metavar="FILE", help="also write the result as an object there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(f"{folder}/train")
        mapped = datasets.Dataset.from_generator(
            lambda: (
                {"input_values": data.audio(row) * data.gains[row], "labels": data.labels(row)}
                for row in range(CLIPS)
            ),
            features=datasets.Features(
                input_values=datasets.List(datasets.Value("float32")),
                labels=datasets.List(datasets.Value("int32")),
            ),
            cache_dir=folder,
        )
        as_numpy = mapped.with_format("numpy")
        shapes = buckets.choose_shapes(data.samples, 12)
        widths = loader.label_widths(data, shapes)
        plan = buckets.TrainPlan(data.samples, shapes, BATCH, 1, seed=0)
        ways = {
            "collator": lambda group: next(
                iter(
                    torch.utils.data.DataLoader(
                        mapped, batch_sampler=[group.rows.tolist()], collate_fn=collate
                    )
                )
            ),
            "numpy rows": lambda group: numpy_rows([as_numpy[r] for r in group.rows.tolist()]),
            "numpy by hand": lambda group: numpy_by_hand(
                [as_numpy[r] for r in group.rows.tolist()]
            ),
            "ours": lambda group: loader.assemble(
                data, group.rows, shapes[group.shape], widths[group.shape]
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(2):
            for name, assemble in ways.items():
                for step in range(arguments.runs):
                    (group,) = plan.update(step)
                    start = time.process_time()
                    assemble(group)
                    if turn > 0:  # the first turn reads the files
                        seconds[name].append(time.process_time() - start)
        median = {name: statistics.median(times) for name, times in seconds.items()}
    print("way           ms a batch  times ours")
    for name, value in median.items():
        print(f"{name:13s} {1e3 * value:10.3f} {value / median['ours']:11.1f}")
    result = {name.replace(" ", "_") + "_seconds": value for name, value in median.items()}
    sidebyside.write_json(arguments.json, [result])


if __name__ == "__main__":
    main()
