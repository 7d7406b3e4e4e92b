"""Training throughput on a GPU, against PyTorch and transformers on the same clips.

    python benchmarks/gpu.py [--updates 60] [--rounds 3] [--rows N] [--json FILE]

XLS-R 300M's shapes with random weights, bf16, 4000 symbols, clips with Common Voice's lengths, one
micro-batch an update, clipping and AdamW, feature encoder frozen, no dropout. `ours`: batches of
12 shapes by the plan of a run, in which an update is one program. `PyTorch`: SDPA, bf16 autocast,
transformers' LengthGroupedSampler, batches padded to their longest clip. Each side has a process of
its own, and before that one more that finds the largest batch of its longest clips that fits, by
doubling; inputs are ready in the host's memory; the sides take turns. Programs that were compiled
once are kept until the end. Audio seconds a second count real audio; the share of peak counts the
FLOPs of real audio too, so that padding is not work.

Where there is no GPU a tiny model in float32 shows that the script works, and nothing else. Needs
the extras `test` and `cuda13` (or `cuda12`), with a torch build of the same CUDA.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

# Of the memory, for ours: as much as PyTorch takes when it has the GPU to itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import numpy as np
import sidebyside
import train_step

from flax_asr import config, kept_programs, optim
from flax_asr.data import buckets, loader
from flax_asr.estimate import flops

CLIPS, SYMBOLS, RATE_HZ = 4096, 4000, 16_000
FIRST_ROWS = 32
"""What the search for the largest batch begins with."""
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}
"""Dense bf16. Source: NVIDIA's data sheets of the SXM boards."""


class Work:
    """What both sides train on: the model, and clips of these lengths."""

    def __init__(self, small: bool, bf16: bool):
        shape = train_step.SMALL if small else train_step.XLS_R_300M
        self.model = train_step.model_config(**shape | {"vocab_size": SYMBOLS})
        self.cfg = config.build(
            {"train": {"mixed_precision": "bf16" if bf16 else "fp32", "max_steps": 1000}}
        )
        rng = np.random.default_rng(0)
        seconds = np.clip(rng.gamma(9.0, 4.15 / 9.0, CLIPS), 1.0, 10.5)
        self.samples = (seconds * RATE_HZ).astype(np.int32)
        self.shapes = buckets.choose_shapes(self.samples, 12)

    def longest(self, rows: int) -> loader.Batch:
        """A batch that takes as much memory as any."""
        return self.batch(np.full(rows, self.shapes[-1]), self.shapes[-1])

    def batch(self, samples: np.ndarray, padded: int) -> loader.Batch:
        return train_step.batch(samples, padded, tokens(padded), SYMBOLS, int(samples.sum()))


def tokens(padded: int) -> int:
    return max(1, padded // 4000)


class Ours:
    """A run's programs and its batch plan."""

    name = "ours"

    def __init__(self, work: Work):
        import jax

        from flax_asr.models import pretrained

        self._work, self._wait = work, jax.block_until_ready
        self._params = pretrained.fresh(work.model, 0)
        self._device = jax.devices()[0]
        self.device = self._device.device_kind
        self._begin()

    def _begin(self) -> None:
        # What a batch that did not fit has donated is gone: begin with new arrays.
        self._step = None
        self._step = train_step.Ours(self._work.cfg, self._work.model, self._params, at_once=True)

    def try_out(self, rows: int) -> None:
        self._begin()
        batch = self._work.longest(rows)
        self._step.compile(rows, batch.audio.shape[1], batch.labels.shape[1])
        for _ in range(2):
            self._step.update(batch)

    def batches(self, rows: int, updates: int) -> list[loader.Batch]:
        work = self._work
        plan = buckets.TrainPlan(work.samples, work.shapes, rows, 1, seed=0)
        groups = [plan.update(step)[0] for step in range(updates)]
        needed = sorted({work.shapes[group.shape] for group in groups}, reverse=True)
        self._step.compile_all([(rows, padded, tokens(padded)) for padded in needed])
        return [work.batch(work.samples[g.rows], work.shapes[g.shape]) for g in groups]

    def run(self, batches: list[loader.Batch]) -> None:
        for batch in batches:
            metrics = self._step.start(batch)
        self._wait((metrics, self._step.state))

    def real_samples(self, batch: loader.Batch) -> np.ndarray:
        return batch.sample_lengths.astype(np.int64)

    def peak_bytes(self) -> int:
        return (self._device.memory_stats() or {"peak_bytes_in_use": 0})["peak_bytes_in_use"]


class PyTorch:
    """transformers' model and its sampler."""

    name = "PyTorch"

    def __init__(self, work: Work):
        import torch
        import torch_step

        self._torch, self._inputs, self._work = torch, torch_step.inputs, work
        self._cuda = torch.cuda.is_available()
        self.device = torch.cuda.get_device_name() if self._cuda else "cpu"
        self._step = torch_step.PyTorch(work.cfg, work.model, "cuda" if self._cuda else "cpu")

    def try_out(self, rows: int) -> None:
        try:
            self.run([self._inputs(self._work.longest(rows))] * 2)
        finally:
            if self._cuda:
                self._torch.cuda.empty_cache()

    def batches(self, rows: int, updates: int) -> list[dict]:
        from transformers.trainer_pt_utils import LengthGroupedSampler

        self._torch.manual_seed(0)
        samples = self._work.samples
        order = list(LengthGroupedSampler(rows, lengths=samples.tolist()))
        made = []
        for update in range(updates):
            chosen = samples[np.take(order, np.arange(rows) + update * rows, mode="wrap")]
            inputs = self._inputs(self._work.batch(chosen, int(chosen.max())))
            if self._cuda:
                inputs = {name: value.pin_memory() for name, value in inputs.items()}
            made.append(inputs)
        return made

    def run(self, batches: list[dict]) -> None:
        for batch in batches:
            loss = self._step.start(batch)
        float(loss)
        if self._cuda:
            self._torch.cuda.synchronize()

    def real_samples(self, batch: dict) -> np.ndarray:
        return batch["attention_mask"].sum(-1).numpy()

    def peak_bytes(self) -> int:
        return self._torch.cuda.max_memory_allocated() if self._cuda else 0


SIDES = {side.name: side for side in (Ours, PyTorch)}


def largest(side: Ours | PyTorch, most: int) -> int:
    """Rows of the longest clips that can be trained on: a power of two, or `most`.

    Not only memory ends it: kernels are refused where an array has more than 2**31 elements.

    Raises:
        RuntimeError: not one row can.
    """

    def fits(rows: int) -> bool:
        try:
            side.try_out(rows)
        except RuntimeError as error:  # that of JAX, and PyTorch's of memory, are such
            print(f"{side.name}: {rows} rows: {str(error)[:200]}", file=sys.stderr)
            if rows == 1:
                raise
            return False
        return True

    rows = min(FIRST_ROWS, most)
    if fits(rows):
        while 2 * rows <= most and fits(2 * rows):
            rows *= 2
        return rows
    while not fits(rows := rows // 2):
        pass
    return rows


def measure(name: str, arguments: argparse.Namespace) -> dict:
    """One side's figures, or without `--rows` how many it can take; has a process of its own."""
    work = Work(arguments.small, arguments.bf16)
    side = SIDES[name](work)
    rows = arguments.rows
    if rows is None:
        return {"rows": largest(side, arguments.most_rows)}
    batches = side.batches(rows, arguments.updates)
    side.run(batches)  # once through everything that may compile, tune or allocate
    started = time.perf_counter()
    side.run(batches)
    spent = time.perf_counter() - started
    real = np.concatenate([side.real_samples(batch) for batch in batches])
    is_trained = optim.trainable(work.cfg.model, work.model)
    # Counted to a tenth of a second: each length takes a while to count.
    lengths, counts = np.unique(np.round(real / 1600) * 1600, return_counts=True)
    floating = sum(
        int(count) * sum(flops.gradient(work.model, 1, int(length), is_trained).values())
        for length, count in zip(lengths, counts, strict=True)
    )
    return {
        "side": name,
        "device": side.device,
        "rows": rows,
        "audio_seconds_per_second": float(real.sum() / RATE_HZ / spent),
        "flops_per_second": floating / spent,
        "peak_bytes": side.peak_bytes(),
    }


def has_gpu() -> bool:
    """Asked in a process of its own, so that this one holds nothing of the GPU."""
    asked = "import jax; print(jax.default_backend())"
    found = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    return found.stdout.strip() == "gpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="clips a batch; by default the most that fit")
    parser.add_argument("--json", metavar="FILE", help="also write one object a side there")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--most-rows", type=int, default=512, help=argparse.SUPPRESS)
    parser.add_argument("--compiled", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        folder = arguments.compiled
        with kept_programs.kept(pathlib.Path(folder)) if folder else contextlib.nullcontext():
            sidebyside.write_json(arguments.json, [measure(arguments.side, arguments)])
        return

    gpu = has_gpu()
    command = [sys.executable, __file__]
    options = [f"--updates={arguments.updates}"]
    options += ["--bf16"] if gpu else ["--most-rows=4"]
    options += ["--small"] if arguments.small or not gpu else []
    found: dict[str, list[dict]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "figures.json"
        options += [f"--compiled={folder}", f"--json={file}"]

        def ask(name: str, *more: str) -> dict:
            # Arrays of JAX would take most of the GPU's memory from PyTorch.
            own = {} if SIDES[name] is Ours else {"JAX_PLATFORMS": "cpu"}
            subprocess.run(
                [*command, f"--side={name}", *options, *more], check=True, env=os.environ | own
            )
            return json.loads(file.read_text())

        rows = {name: arguments.rows or ask(name)["rows"] for name in SIDES}
        for _ in range(arguments.rounds):
            for name in SIDES:
                found[name].append(ask(name, f"--rows={rows[name]}"))
    report(found, arguments.json)


def report(found: dict[str, list[dict]], path: str | None) -> None:
    """Prints the table; medians over the rounds."""
    device = found["ours"][0]["device"]
    peak = next((value for name, value in PEAK_FLOPS.items() if name in device), None)
    print(f"{device}; medians of {len(found['ours'])} rounds")
    print("side      rows  audio s a second  share of peak  memory GB")
    results = []
    for name, rounds in found.items():
        row = {"side": name, "device": device, "rows": rounds[0]["rows"]}
        for figure in ("audio_seconds_per_second", "flops_per_second", "peak_bytes"):
            row[figure] = statistics.median(entry[figure] for entry in rounds)
        share = f"{row['flops_per_second'] / peak:14.1%}" if peak else f"{'unknown':>14s}"
        print(
            f"{name:8s} {row['rows']:5d} {row['audio_seconds_per_second']:17.1f} {share}"
            f" {row['peak_bytes'] / 1e9:10.2f}"
        )
        results.append(row)
    ours, theirs = (row["audio_seconds_per_second"] for row in results)
    print(f"ours {ours / theirs:.2f} x PyTorch")
    sidebyside.write_json(path, results)


if __name__ == "__main__":
    main()
