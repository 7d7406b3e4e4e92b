"""The quick start in fp32, bf16 and fp16, over several seeds: do the scores agree within noise?

    python benchmarks/precision.py [--seeds 3] [--steps 600] [--folder FOLDER] [--json FILE]

Every run is `flax-asr train --config configs/quickstart.yaml` with another precision and seed (of
the fresh head, the batch order and dropout). It prints the character error rates of the best
checkpoint, skipped updates and the last loss scale. With --folder, what is finished there is not
run again. A run of 600 updates takes under three minutes on two idle cores.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from flax_asr.record import runlog

ROOT = pathlib.Path(__file__).parents[1]
PRECISIONS = ("fp32", "bf16", "fp16")


def run(folder: pathlib.Path, precision: str, seed: int, steps: int) -> dict:
    """One run: its scores, and what its log says about skipped updates."""
    target = folder / f"{precision}-seed-{seed}-steps-{steps}"
    interval = max(1, steps // 4)
    options = {
        "output_dir": target,
        "data.prepared_dir": folder / "prepared",
        "seed": seed,
        "train.mixed_precision": precision,
        "train.max_steps": steps,
        "train.logging_steps": max(1, interval // 3),
        "train.eval_steps": interval,
        "train.save_steps": interval,
    }
    command = [sys.executable, "-m", "flax_asr", "train", "--config", "configs/quickstart.yaml"]
    subprocess.run(
        [*command, *(f"--{name}={value}" for name, value in options.items())],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        check=True,
    )
    history = runlog.read(target)
    (tested,) = [event for event in history if "test_cer" in event]
    scored = {event["step"]: event for event in history if "eval_cer" in event}
    last = [event for event in history if "loss_scale" in event][-1]
    return {
        "precision": precision,
        "seed": seed,
        "steps": steps,
        "best_step": tested["best_step"],
        "eval_cer": scored[tested["best_step"]]["eval_cer"],
        "test_cer": tested["test_cer"],
        "test_cer_low": tested["test_cer_low"],
        "test_cer_high": tested["test_cer_high"],
        "skipped_steps": last["skipped_steps"],
        "loss_scale": last["loss_scale"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=600, help="updates of a run")
    parser.add_argument("--folder", help="where the runs are kept; by default nowhere")
    parser.add_argument("--json", metavar="FILE", help="also write one object a run there")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(arguments.folder or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        print("precision  seed  dev CER  test CER (95 %)             skipped  loss scale")
        for seed in range(arguments.seeds):
            for precision in PRECISIONS:
                row = run(folder, precision, seed, arguments.steps)
                rows.append(row)
                print(
                    f"{precision:9s} {seed:5d} {row['eval_cer']:8.4f} {row['test_cer']:9.4f}"
                    f" ({row['test_cer_low']:.4f} to {row['test_cer_high']:.4f})"
                    f" {row['skipped_steps']:7d} {row['loss_scale']:11g}",
                    flush=True,
                )
    for precision in PRECISIONS:
        rates = [row["test_cer"] for row in rows if row["precision"] == precision]
        spread = f", standard deviation {statistics.stdev(rates):.4f}" if len(rates) > 1 else ""
        print(f"{precision}: mean test CER {statistics.mean(rates):.4f}{spread}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
