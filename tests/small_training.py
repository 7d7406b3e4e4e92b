"""A whole training run that takes seconds: a corpus in Common Voice's form and a tiny model."""

import atexit
import json
import logging
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Callable

import flax.traverse_util
import jax
import numpy as np
import soundfile

from flax_asr import __main__, audio, export, inventory, kept_programs
from flax_asr.hosts import multihost
from flax_asr.record import runlog

CLIPS = {"train": 16, "dev": 4, "test": 5}
UPDATES = 8
MODEL = {
    "conv_dim": [16, 16],
    "conv_kernel": [32, 10],
    "conv_stride": [32, 10],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
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
            noise = rng.standard_normal(samples) * 0.1
            soundfile.write(clips / name, noise, audio.SAMPLE_RATE_HZ)
            words = ["".join(rng.choice(list("abcdê"), 3)) for _ in range(2)]
            rows.append(f"{split}-{number % 3}\t{name}\t{' '.join(words)}\tfemale_feminine")
        (clips.parent / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "cv-corpus-1"


def command(source: pathlib.Path, folder: pathlib.Path | str, *more: str) -> list[str]:
    """Arguments of `flax-asr`; options in `more` take the place of those here."""
    options = {
        "output_dir": folder,
        "data.source": source,
        "data.language": "cy",
        "data.num_buckets": 1,
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


class Process:
    """`flax-asr` in a process of its own, forked where everything is already imported.

    Args:
        arguments: of the command line.
        output: the file that standard output and error go to.
        cache: where compiled programs are kept, of however little work.
        devices: how many fake ones.
        in_pytorch: whether the export is compared with PyTorch, which takes seconds.
        environment: further variables.
        lost_seconds: after how long another host counts as lost.
    """

    def __init__(
        self,
        arguments: list[str],
        output: pathlib.Path,
        cache: pathlib.Path,
        devices: int = 2,
        in_pytorch: bool = False,
        environment: dict[str, str] | None = None,
        lost_seconds: float = multihost.LOST_SECONDS,
    ):
        self._output = output
        output.write_text("")
        fork = multiprocessing.get_context("forkserver")
        fork.set_forkserver_preload(["flax_asr.loop", "small_training"])
        self._process = fork.Process(
            target=_main,
            args=(arguments, str(output), str(cache), devices, in_pytorch),
            kwargs={"environment": environment or {}, "lost_seconds": lost_seconds},
        )
        self._process.start()

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 900) -> None:
        """Returns when the condition holds; the process must live until then."""
        limit = time.monotonic() + seconds
        while not condition():
            assert self.alive, self.output
            assert time.monotonic() < limit, self.output
            time.sleep(0.002)

    def wait_until_compiled(self) -> bool:
        """Whether it came to that; False where the process has ended before."""
        while self.alive and not re.search(r"compiling: (\d+)/\1 ", self.output):
            time.sleep(0.002)
        return self.alive

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def end(self, seconds: float = 900) -> int:
        """The exit status."""
        self._process.join(seconds)
        assert not self.alive, self.output
        return self._process.exitcode


def _main(
    arguments: list[str],
    output: str,
    cache: str,
    devices: int,
    in_pytorch: bool,
    environment: dict[str, str],
    lost_seconds: float,
) -> None:
    os.environ.update(environment)
    multihost.LOST_SECONDS = lost_seconds
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    share_compiled(cache)
    if not in_pytorch:
        without_torch()
    if "STORAGE_EMULATOR_HOST" in environment:
        import small_bucket

        small_bucket.hasten()
    try:
        sys.exit(__main__.main(arguments))
    finally:
        atexit._run_exitfuncs()  # as the interpreter does, and multiprocessing does not


def without_torch() -> None:
    """Exports are not compared with PyTorch, as where it is not installed."""
    export._torch_is_installed = lambda: False


def share_compiled(cache: str) -> None:
    """Keeps every compiled program in one folder, whatever run asks for it."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    kept_programs._tell_jax = lambda folder: None


def process() -> dict[str, object]:
    """What is one for the whole process, and a run is to leave as a program has it."""
    return {
        "settings of JAX": {name: getattr(jax.config, name, None) for name in jax.config.values},
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "log of orbax": logging.getLogger("absl").level,
        "filters of tasks": list(logging.getLogger("asyncio").filters),
        "hook": sys.unraisablehook,
        "threads": {thread.name for thread in threading.enumerate()},
    }


def changed(before: dict[str, object]) -> dict[str, object]:
    """What is no longer as `process` gave it; a thread of an earlier test may end at any time."""
    now = process()
    now["threads"] |= before["threads"]
    return {name: value for name, value in now.items() if value != before[name]}


class Place:
    """Where runs are: one corpus, and the compiled programs of all tests."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.source = folder / "cv-corpus-1"
        self.cache = jax.config.jax_compilation_cache_dir

    def command(self, run: pathlib.Path, *more: str) -> list[str]:
        return command(self.source, run, *more)

    def start(self, run: pathlib.Path, *more: str, cache=None, **how):
        return Process(
            self.command(run, *more),
            run.with_name(f"{run.name}.txt"),
            cache or self.cache,
            **how,
        )

    def finish(self, run: pathlib.Path, *more: str, **how) -> str:
        """Runs to the end; gives the output."""
        process = self.start(run, *more, **how)
        assert process.end() == 0, process.output
        return process.output


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


def assert_same(folder: pathlib.Path, other: pathlib.Path) -> None:
    """The same log, and the same state and figures in every checkpoint that both still have."""
    assert log(folder) == log(other)
    ours, theirs = inventory.steps(folder), inventory.steps(other)
    assert ours[0] == theirs[0]
    for step in set(ours) & set(theirs):
        assert state(folder, step) == state(other, step), step
        one, two = inventory.read_meta(folder, step), inventory.read_meta(other, step)
        assert (one.metrics, one.window, one.facts) == (two.metrics, two.window, two.facts)


def state(folder: pathlib.Path, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint, as bytes."""
    return {name: array.tobytes() for name, array in arrays(folder, step).items()}


def arrays(folder: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((folder / inventory.FOLDER / str(step) / "state").absolute())
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return {name: np.asarray(leaf) for name, leaf in flat.items()}
