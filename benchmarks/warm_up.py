"""What the warm-up of a run on a TPU takes: every program of the zh-HK recipe, every shape.

    python benchmarks/warm_up.py [--config configs/xls_r_300m_zh_hk.yaml] [--topology v5e:1x1]
        [--layers 24] [--shapes 10] [--even-shapes] [--json FILE]
    python benchmarks/warm_up.py --one-at-a-time [--every 3] [--function accumulate]
    python benchmarks/warm_up.py --lower

With the options that the recipe names for a TPU chip: bf16, nothing recomputed, or as the recipe
itself has it with --checkpointing. Compiled for a chip that is not here, as a run compiles: the
largest shapes first, one program a core at once. The shapes are those that a run would choose for
clips as long as in padding.py, or with --even-shapes those that `flax-asr plan` guesses without
data: evenly spaced up to data.max_seconds. Needs libtpu (`pip install '.[tpu]'`); takes half an
hour of two cores. JAX's persistent cache keeps nothing that was compiled for a described chip, so
that a second start cannot be measured here.

With --one-at-a-time a line a program has its own processor time, and its code, which stays in the
device's memory beside that of all others. --every 3 compiles the largest of a function's shapes,
the fourth largest and so on; what all would take is worked out from those. --lower stops where the
compiler or its cache would be asked: Python's part, which a second start has to do again.
"""

import argparse
import collections
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Iterator

import padding
import sidebyside

from flax_asr import batch_size, compilation, config, plan, programs, static_shapes
from flax_asr.data import buckets
from flax_asr.estimate import chips, workload

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "xls_r_300m_zh_hk.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument("--layers", type=int, help="in place of the encoder's own number")
    parser.add_argument("--shapes", type=int, help="in place of data.num_buckets")
    parser.add_argument("--even-shapes", action="store_true", help="up to data.max_seconds")
    parser.add_argument("--checkpointing", action="store_true", help="activations recomputed")
    parser.set_defaults(rows=as_a_run)
    for option, rows, what in (
        ("--one-at-a-time", one_at_a_time, "a line a program"),
        ("--lower", lowered, "until the compiler is asked, only"),
    ):
        parser.add_argument(option, dest="rows", action="store_const", const=rows, help=what)
    parser.add_argument("--every", type=int, default=1, help="every N-th shape of a function only")
    parser.add_argument("--function", help="this one only: accumulate, update or evaluate")
    parser.add_argument("--json", metavar="FILE", help="also write the result as an object there")
    arguments = parser.parse_args()

    devices = plan.describe(chips.parse(arguments.topology))
    options = ["--train.mixed_precision", "bf16"]
    options += ["--train.gradient_checkpointing", str(arguments.checkpointing).lower()]
    if arguments.layers is not None:
        options += ["--model.config.num_hidden_layers", str(arguments.layers)]
    if arguments.shapes is not None:
        options += ["--data.num_buckets", str(arguments.shapes)]
    cfg = batch_size.resolve(config.load(arguments.config, options), devices.count)
    work = workload.of(cfg, devices.count)
    if not arguments.even_shapes:
        work = in_common_voice(work, cfg.data.num_buckets)
        shapes = work.data.train_shapes.samples
        real = padding.planned_efficiency(padding.lengths(), shapes)
        print(f"{len(shapes)} shapes for training, in which {real:.3f} of the samples are real")
    jobs = programs.jobs(work.steps(cfg), devices, (0, workload.PLANNED_UPDATES - 1))
    jobs = {key: job for key, job in jobs.items() if arguments.function in (None, key[0])}
    chosen_jobs = {key: jobs[key] for key in chosen(jobs, arguments.every)}
    sidebyside.write_json(arguments.json, list(arguments.rows(jobs, chosen_jobs)))


def in_common_voice(work: workload.Workload, num_buckets: int) -> workload.Workload:
    """With the shapes that a run would choose for clips of Common Voice's lengths."""
    lengths = padding.lengths()
    train, scored = (
        workload.labelled(buckets.choose_shapes(lengths, count))
        for count in (num_buckets, static_shapes.scoring_buckets(num_buckets))
    )
    data = work.data._replace(train_shapes=train, eval_shapes=scored)
    return dataclasses.replace(work, data=data)


def chosen(jobs: dict, every: int) -> list[programs.Key]:
    """Each function's largest shape and every N-th after it."""
    by_name: dict[str, list[programs.Key]] = {}
    for key in jobs:
        by_name.setdefault(key[0], []).append(key)
    return [key for keys in by_name.values() for key in keys[::every]]


def one_at_a_time(jobs: dict, chosen_jobs: dict) -> Iterator[dict]:
    """A row for each that is chosen, and a last one for all jobs."""
    found: dict[str, list[dict]] = {}
    for key, (function, shapes) in chosen_jobs.items():
        started, used = time.monotonic(), time.process_time()
        compiled = function.compile(*shapes)
        row = {
            "function": key[0],
            "audio_seconds": key[1] / 16_000,
            "seconds": round(time.monotonic() - started, 1),
            "cpu_seconds": round(time.process_time() - used, 1),
            "code_bytes": compiled.memory_analysis().generated_code_size_in_bytes,
        }
        found.setdefault(key[0], []).append(row)
        print(
            f"{key[0]:16s} {row['audio_seconds']:5.1f} s of audio: {row['cpu_seconds']:4.0f} s of"
            f" processor time, {row['seconds']:4.0f} by the clock;"
            f" {row['code_bytes'] / 1e6:.0f} MB of code",
            flush=True,
        )
        yield row
    count = collections.Counter(name for name, _ in jobs)

    def of_all(what: str) -> float:
        return sum(count[n] * statistics.mean(r[what] for r in rows) for n, rows in found.items())

    total = {
        "programs": len(jobs),
        "compiled": sum(map(len, found.values())),
        "cpu_seconds": round(of_all("cpu_seconds")),
        "code_bytes": round(of_all("code_bytes")),
    }
    print(
        f"{total['compiled']} of {total['programs']} programs compiled; all of them:"
        f" {total['cpu_seconds'] / 60:.1f} minutes of processor time (goal 20),"
        f" {total['code_bytes'] / 1e9:.2f} GB of code"
    )
    yield total


def lowered(jobs: dict, chosen_jobs: dict) -> Iterator[dict]:
    """One row: traced and lowered, one after the other, as Python does one thing at a time."""
    used: dict[str, list[float]] = {}
    for key, (function, shapes) in chosen_jobs.items():
        before = time.process_time()
        function.lower(*shapes)
        used.setdefault(key[0], []).append(time.process_time() - before)
    row = {
        "programs": len(chosen_jobs),
        "cpu_seconds": round(sum(map(sum, used.values())), 1),
        "mean_seconds": {name: round(statistics.mean(all_), 2) for name, all_ in used.items()},
    }
    print(
        f"{row['programs']} programs traced and lowered in {row['cpu_seconds']} s of processor"
        f" time; seconds of one: {row['mean_seconds']}"
    )
    yield row


def as_a_run(jobs: dict, chosen_jobs: dict) -> Iterator[dict]:
    """One row, of the programs that are chosen."""
    seconds: dict[str, list[float]] = {}

    def report(key: programs.Key, took: float) -> None:
        name, samples = key
        seconds.setdefault(name, []).append(took)
        print(
            f"{name:16s} {samples / 16_000:5.1f} s of audio: compiled in {took:.0f} s", flush=True
        )

    started, used = time.monotonic(), time.process_time()
    compilation.compile_all(chosen_jobs, report)
    row = {
        "programs": len(chosen_jobs),
        "seconds": round(time.monotonic() - started),
        "cpu_seconds": round(time.process_time() - used),
        "mean_seconds": {name: round(sum(all_) / len(all_)) for name, all_ in seconds.items()},
    }
    print(
        f"{row['programs']} programs in {row['seconds']} s by the clock, {row['cpu_seconds']} s of"
        f" processor time ({row['cpu_seconds'] / 60:.1f} minutes; goal 20)"
    )
    yield row


if __name__ == "__main__":
    main()
