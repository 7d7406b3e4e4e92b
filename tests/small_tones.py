"""A language that a tiny model learns in a minute: every letter is a tone of its own."""

import json
import pathlib

import numpy as np
import soundfile

from flax_asr import audio

LETTERS = "abcdefgh"
CLIPS = {"train": 192, "dev": 24, "test": 24}
MODEL = {
    "conv_dim": [32, 32],
    "conv_kernel": [80, 4],
    "conv_stride": [80, 4],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "mask_time_prob": 0.0,
    **dict.fromkeys(
        (
            "layerdrop hidden_dropout attention_dropout activation_dropout feat_proj_dropout"
            " final_dropout"
        ).split(),
        0.0,
    ),
}
OPTIONS = {
    "data.language": "zh-HK",
    "data.num_buckets": 2,
    "data.num_workers": 1,
    "model.freeze_feature_encoder": "false",
    "optim.warmup_steps": 20,
    "train.global_batch_size": 16,
    "train.per_device_train_batch_size": 8,
    "train.per_device_eval_batch_size": 8,
    "train.mixed_precision": "fp32",
    "train.logging_steps": 20,
    "train.eval_steps": 100,
    "train.save_steps": 100,
}


def corpus(folder: pathlib.Path) -> pathlib.Path:
    """A release folder; clips have 3 to 9 letters and some silence around them."""
    rng = np.random.default_rng(0)
    clips = folder / "cv-corpus-1" / "zh-HK" / "clips"
    clips.mkdir(parents=True)
    for split, count in CLIPS.items():
        rows = ["client_id\tpath\tsentence"]
        for number in range(count):
            text = "".join(rng.choice(list(LETTERS), rng.integers(3, 10)))
            name = f"{split}{number}.wav"
            soundfile.write(clips / name, _spoken(text, rng), audio.SAMPLE_RATE_HZ)
            rows.append(f"{split}-{number % 5}\t{name}\t{text}")
        (clips.parent / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "cv-corpus-1"


def _spoken(text: str, rng: np.random.Generator) -> np.ndarray:
    rate = audio.SAMPLE_RATE_HZ
    pieces = [np.zeros(int(rng.uniform(0.02, 0.1) * rate))]
    for letter in text:
        times = np.arange(int(rng.uniform(0.07, 0.1) * rate)) / rate
        hertz = 300 * 1.35 ** LETTERS.index(letter)
        pieces += [0.3 * np.sin(2 * np.pi * hertz * times + rng.uniform(0, 6))]
        pieces += [np.zeros(int(rng.uniform(0.02, 0.05) * rate))]
    heard = np.concatenate([*pieces, pieces[0]])
    return heard + 0.01 * rng.standard_normal(len(heard))


def command(source: pathlib.Path, run: pathlib.Path, **more: object) -> list[str]:
    """Arguments of `flax-asr`; `more` has "__" for a dot."""
    options = OPTIONS | {
        "output_dir": run,
        "data.source": source,
        "data.prepared_dir": source.parent / "prepared",
        **{f"model.config.{name}": json.dumps(value) for name, value in MODEL.items()},
    }
    options |= {name.replace("__", "."): value for name, value in more.items()}
    return ["train", *(f"--{name}={value}" for name, value in options.items())]
