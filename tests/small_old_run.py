"""A run that both this package and transformers 4.17 can make: corpus, weights, options.

All of it follows from numpy's raw bits, which are the same everywhere and for ever. Nothing but
numpy and soundfile is needed here: tests/fixtures/make_hf417_log.py imports it too.
"""

import math
import pathlib
import zlib

import numpy as np
import soundfile

RATE_HZ = 16_000
CLIPS = {"train": 37, "dev": 11}
WORDS = ("Ab", "ca'b", "b-a", "你好，", "C", "42ba", "ccab!", "a你")
CHARS_TO_IGNORE = [",", "?", ".", "!", "-", ";", ":", '"', "“", "%", "‘", "”", "�"]
"""As the shell hands them over where the command line says `\\-`."""
MICRO_BATCH, ACCUMULATION, EPOCHS = 4, 4, 21
"""37 clips make 10 micro-batches, one of them of one clip: 2 updates an epoch and 2 left over."""
EVAL_BATCH, LOGGING_STEPS, EVAL_STEPS = 4, 3, 7
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 1e-2, 5, 0.1
HIDDEN, CONV, FEED_FORWARD, KERNEL, GROUPS = 32, 24, 48, 8, 2
MODEL = {
    "conv_dim": [CONV, CONV],
    "conv_kernel": [80, 4],
    "conv_stride": [80, 4],
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_conv_pos_embeddings": KERNEL,
    "num_conv_pos_embedding_groups": GROUPS,
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "ctc_loss_reduction": "mean",
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "layerdrop": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
}


def _uniform(name: str, count: int) -> np.ndarray:
    """Numbers from 0 to 1 that belong to this name."""
    bits = np.random.PCG64(np.random.SeedSequence(zlib.crc32(name.encode())))
    return (bits.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sentence(split: str, number: int) -> str:
    words = (_uniform(f"{split} {number} words", 3) * len(WORDS)).astype(int)
    return " ".join(WORDS[word] for word in words[: 1 + number % 3])


def wave(split: str, number: int) -> np.ndarray:
    """A tone for every character, and some noise; 0.6 to 2 seconds."""
    said = sentence(split, number)
    lengths = 4000 + (3000 * _uniform(f"{split} {number} lengths", len(said))).astype(int)
    tones = [
        0.3 * np.sin(2 * math.pi * (300 + 37 * (ord(character) % 29)) * np.arange(length) / RATE_HZ)
        for character, length in zip(said, lengths, strict=True)
    ]
    heard = np.concatenate([np.zeros(1600), *tones, np.zeros(1600)])
    return heard + 0.02 * (_uniform(f"{split} {number} noise", len(heard)) - 0.5)


def corpus(folder: pathlib.Path) -> pathlib.Path:
    """A release folder of language zh-HK."""
    clips = folder / "cv-corpus-1" / "zh-HK" / "clips"
    clips.mkdir(parents=True)
    for split, count in CLIPS.items():
        rows = ["client_id\tpath\tsentence"]
        for number in range(count):
            name = f"{split}{number}.wav"
            soundfile.write(clips / name, wave(split, number), RATE_HZ, "FLOAT")
            rows.append(f"{split}-{number % 5}\t{name}\t{sentence(split, number)}")
        (clips.parent / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "cv-corpus-1"


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Of every parameter, by the name that Hugging Face gave it in 2022."""
    made = {}
    for name, shape in shapes.items():
        count = math.prod(shape)
        if name.endswith("layer_norm.weight"):
            value = np.ones(shape)
        elif name.endswith("bias"):
            value = np.zeros(shape)
        elif name.endswith("weight_g"):
            value = np.ones(shape)
        else:
            fan_in = max(1, count // shape[0])
            value = (2 * _uniform(name, count) - 1).reshape(shape) * math.sqrt(3 / fan_in)
        made[name] = value.astype(np.float32)
    return made
