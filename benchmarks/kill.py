"""kill -9 at random moments: does every run end bit-identical to the one that was never killed?

    python benchmarks/kill.py [--kills 100] [--global-batch-size 8] [--json FILE]

The tiny run of the tests (two fake CPU devices; dropout, SpecAugment, layerdrop and accumulation
on; with a global batch of 4 every update is one micro-batch) is killed again and again, until it
ends before the next kill; then its log, and parameters, optimiser state and figures of every
checkpoint are compared, bit for bit, with the uninterrupted run's. Then the next run begins, until
enough kills have hit. A kill comes at a random moment of the seconds after compilation, fewer of
them where a run ended before: most hit updates, some saving, scoring, exporting.
"""

import argparse
import collections
import json
import pathlib
import shutil
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import small_training

from flax_asr import inventory
from flax_asr.record import runlog

MOST_KILLS_A_RUN = 10
UPDATES = 150


def moment(run: pathlib.Path) -> str:
    """What the process was killed in."""
    if any((run / inventory.FOLDER).glob(".unfinished-*")):
        return "saving"
    if any("best_step" in event for event in runlog.read(run)):
        return "finishing"
    return "training and scoring"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--json", metavar="FILE", help="also write one object a run there")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="flax-asr-kill-"))
    source = small_training.corpus(folder)

    def start(run: pathlib.Path) -> small_training.Process:
        return small_training.Process(
            small_training.command(
                source,
                run,
                f"--train.max_steps={UPDATES}",
                f"--train.global_batch_size={arguments.global_batch_size}",
                "--data.num_buckets=2",
            ),
            folder / "output.txt",
            folder / "compiled",
        )

    whole = folder / "whole"
    assert start(whole).end() == 0
    # Once more with everything compiled, to know how long a run takes after that.
    shutil.rmtree(whole)
    process = start(whole)
    assert process.wait_until_compiled()
    began = time.monotonic()
    assert process.end() == 0
    seconds = time.monotonic() - began

    rows, moments = [], collections.Counter()
    while moments.total() < arguments.kills:
        run = folder / f"run-{len(rows)}"
        kills = 0
        while kills < min(MOST_KILLS_A_RUN, arguments.kills - moments.total() + kills):
            process = start(run)
            if not process.wait_until_compiled():
                break
            time.sleep(rng.uniform(0, seconds / 4))
            if not process.alive:
                seconds *= 0.8
                break
            process.kill()
            kills += 1
            moments[moment(run)] += 1
        status = start(run).end()
        row = {"run": len(rows), "kills": kills, "status": status, "identical": False}
        try:
            small_training.assert_same(run, whole)
            row["identical"] = status == 0
        except AssertionError as error:
            print(error)
        rows.append(row)
        print(
            f"run {row['run']}: {kills} kills, {'same' if row['identical'] else 'DIFFERENT'}",
            flush=True,
        )
        if row["identical"]:
            shutil.rmtree(run)
    same = sum(row["identical"] for row in rows)
    hit = ", ".join(f"{count} in {name}" for name, count in sorted(moments.items()))
    print(f"{moments.total()} kills ({hit}): {same} of {len(rows)} runs bit-identical")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    shutil.rmtree(folder, ignore_errors=True)
    return 0 if same == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
