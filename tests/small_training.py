"""A whole training run that takes seconds: a corpus in Common Voice's form and a tiny model."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import flax.traverse_util
import numpy as np
import soundfile
from small_saved import speech

from flax_asr import audio, checkpoint, runlog

ROOT = pathlib.Path(__file__).parents[1]
CLIPS = {"train": 16, "dev": 4, "test": 5}
UPDATES = 8
MODEL = {
    "conv_dim": [16, 16],
    "conv_kernel": [32, 10],
    "conv_stride": [32, 10],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "layerdrop": 0.2,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "mask_time_prob": 0.4,
    "mask_time_length": 2,
    "mask_feature_prob": 0.2,
    "mask_feature_length": 3,
}
"""Dropout in every place, SpecAugment in both directions."""

TRAIN = {
    "max_steps": UPDATES,
    "global_batch_size": 8,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "mixed_precision": "fp32",
    "logging_steps": 2,
    "eval_steps": 4,
    "save_steps": 3,
    "save_total_limit": 2,
}
"""On two devices two groups make an update; logging, scoring and saving fall on other steps."""


def corpus(folder: pathlib.Path) -> pathlib.Path:
    """A release folder with clips of 0.2 to 0.9 seconds."""
    rng = np.random.default_rng(0)
    clips = folder / "cv-corpus-1" / "cy" / "clips"
    clips.mkdir(parents=True)
    number = 0
    for split, count in CLIPS.items():
        rows = ["client_id\tpath\tsentence\tgender"]
        for _ in range(count):
            number += 1
            samples = int(rng.uniform(0.2, 0.9) * audio.SAMPLE_RATE_HZ)
            name = f"common_voice_cy_{number}.wav"
            soundfile.write(clips / name, speech(samples, number), audio.SAMPLE_RATE_HZ)
            words = ["".join(rng.choice(list("abcdê"), 3)) for _ in range(2)]
            rows.append(f"{split}-{number % 3}\t{name}\t{' '.join(words)}\tfemale_feminine")
        (clips.parent / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "cv-corpus-1"


def command(source: pathlib.Path, folder: pathlib.Path, *more: str) -> list[str]:
    """Arguments of `flax-asr`; options in `more` take the place of those here."""
    options = {
        "output_dir": folder,
        "data.source": source,
        "data.language": "cy",
        "data.num_buckets": 2,
        "data.num_workers": 1,
        "data.prepared_dir": source.parent / "prepared",
        "optim.learning_rate": 1e-2,
        "optim.warmup_steps": 1,
        **{f"train.{name}": value for name, value in TRAIN.items()},
        **{f"model.config.{name}": json.dumps(value) for name, value in MODEL.items()},
    }
    options |= dict(option.removeprefix("--").split("=", 1) for option in more if "=" in option)
    flags = [option for option in more if "=" not in option]
    return ["train", *flags, *(f"--{name}={value}" for name, value in options.items())]


def start(arguments: list[str], devices: int = 2, **popen) -> subprocess.Popen:
    """`flax-asr` as a process of its own."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "flax_asr", *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **popen,
    )


def wait_for(process: subprocess.Popen, condition, seconds: float = 120) -> None:
    """Returns when the condition holds; the process must live until then."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit, "too slow"
        time.sleep(0.005)


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    process.communicate()


def log(folder: pathlib.Path) -> list[dict]:
    """The events of log.jsonl without what depends on the clock."""
    return [
        {
            name: value
            for name, value in event.items()
            if name != "time" and not name.endswith(("_seconds", "_per_second"))
        }
        for event in runlog.read(folder)
    ]


def state(folder: pathlib.Path, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint, as bytes."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((folder / checkpoint.FOLDER / str(step) / "state").absolute())
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return {name: np.asarray(leaf).tobytes() for name, leaf in flat.items()}
