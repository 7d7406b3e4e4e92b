"""Does going on cost more the later a run was stopped? And what does reading the audio again cost?

    python benchmarks/resume.py [--steps 10 10000] [--runs 5] [--json FILE]

The tiny run of the tests is made as long as each of the steps, then longer by one update: processor
time from the command to that update, programs already compiled, and the clips that were read for
it. Then the audio that training hashes beside its first updates: processor time an hour of it.
"""

import argparse
import contextlib
import io
import logging
import os
import pathlib
import shutil
import sys
import tempfile
import time

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import numpy as np
import sidebyside
import small_training

from flax_asr import __main__, audio
from flax_asr.data import examples, rereading, shard_writer, shards
from flax_asr.training import monitor

HEARD_SECONDS = 1800


class Reached(Exception):
    """The first update after the resume is done."""


def going_on(command: list[str]) -> tuple[float, int]:
    """Processor seconds until the first update of a run that goes on, and clips read for it."""
    read, count, hear = [], monitor.Monitor.count, examples.Examples.recordings

    def counted(*update):
        count(*update)
        raise Reached

    def heard(data, rows):
        read.extend(rows)
        return hear(data, rows)

    monitor.Monitor.count, examples.Examples.recordings = counted, heard
    started = time.process_time()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Reached):
            __main__.main(command)
        return time.process_time() - started, len(read)
    finally:
        monitor.Monitor.count, examples.Examples.recordings = count, hear


def resumes(folder: pathlib.Path, steps: list[int], runs: int) -> list[dict[str, float]]:
    """One row a step, the least of several runs, which take turns."""
    logging.disable(logging.WARNING)
    source = small_training.corpus(folder)
    small_training.share_compiled(str(folder / "compiled"))
    small_training.without_torch()

    def command(run: pathlib.Path, updates: int) -> list[str]:
        scored = ("--data.eval_splits=[]", "--data.test_splits=[]")
        rare = (f"--train.save_steps={max(steps)}", f"--train.logging_steps={max(steps)}")
        return small_training.command(source, run, f"--train.max_steps={updates}", *scored, *rare)

    for step in steps:
        with contextlib.redirect_stderr(io.StringIO()):
            assert __main__.main(command(folder / f"whole-{step}", step)) == 0
    rows = {step: {"step": step, "processor_seconds": float("inf"), "clips": 0} for step in steps}
    for turn in range(1 + runs):
        for step, row in rows.items():
            run = pathlib.Path(shutil.copytree(folder / f"whole-{step}", folder / "run"))
            seconds, row["clips"] = going_on(command(run, step + 1))
            if turn > 0:
                row["processor_seconds"] = min(row["processor_seconds"], seconds)
            shutil.rmtree(run)
    return list(rows.values())


def rereads(folder: pathlib.Path, runs: int) -> dict[str, float]:
    """Processor seconds an hour of audio."""
    clip = np.zeros(10 * audio.SAMPLE_RATE_HZ, np.int16)
    with shard_writer.ShardWriter(folder) as writer:
        for number in range(HEARD_SECONDS // 10):
            facts = shards.ClipFacts(id=str(number), sentence="a")
            writer.add(facts, clip, 1.0, str(number))
        writer.finish(source="zeros", release="zeros", split="train")
    split = shards.PreparedSplit.open(folder)
    ways = {"read": lambda: rereading.Rereading([split]).wait()}
    seconds = sidebyside.medians(ways, runs, clock=time.process_time)["read"]
    return {"processor_seconds_an_hour": seconds * 3600 / HEARD_SECONDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 10_000])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="also write one object a row there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flax-asr-resume-") as folder:
        rows = resumes(pathlib.Path(folder), arguments.steps, arguments.runs)
        again = rereads(pathlib.Path(folder) / "train", arguments.runs)
    for row in rows:
        print(
            f"going on after update {row['step']}: {row['processor_seconds']:.2f} s of processor"
            f" time to the next, {row['clips']} clips read"
        )
    print(f"audio read again: {again['processor_seconds_an_hour']:.3f} s of processor time an hour")
    sidebyside.write_json(arguments.json, [*rows, again])


if __name__ == "__main__":
    main()
