"""What the warm-up of a run on a TPU takes: every program of the zh-HK recipe, every shape.

    python benchmarks/warm_up.py [--config configs/xls_r_300m_zh_hk.yaml] [--topology v5e:1x1]
        [--layers 24] [--json FILE]

Compiled for a chip that is not here, as a run compiles: the largest shapes first, one program a
core at once. The shapes are guessed, as no data are there: evenly spaced up to data.max_seconds.
Needs libtpu (`pip install '.[tpu]'`); takes half an hour of two cores. JAX's persistent cache keeps
nothing that was compiled for a described chip, so that a second start cannot be measured here.
"""

import argparse
import pathlib
import time

import sidebyside

from flax_asr import config, parallel, plan, programs, run_folder
from flax_asr.estimate import chips, workload

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "xls_r_300m_zh_hk.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument("--layers", type=int, help="in place of the encoder's own number")
    parser.add_argument("--shapes", type=int, help="in place of data.num_buckets")
    parser.add_argument("--json", metavar="FILE", help="also write the result as an object there")
    arguments = parser.parse_args()

    devices = plan.describe(chips.parse(arguments.topology))
    options = ["--train.mixed_precision", "bf16"]
    if arguments.layers is not None:
        options += ["--model.config.num_hidden_layers", str(arguments.layers)]
    if arguments.shapes is not None:
        options += ["--data.num_buckets", str(arguments.shapes)]
    cfg = run_folder.resolve(config.load(arguments.config, options), devices.count)
    work = workload.of(cfg, devices.count)
    jobs = programs.jobs(work.steps(cfg), devices, (0, workload.PLANNED_UPDATES - 1))
    seconds: dict[str, list[float]] = {}

    def report(key: programs.Key, took: float) -> None:
        name, samples = key
        seconds.setdefault(name, []).append(took)
        print(
            f"{name:16s} {samples / 16_000:5.1f} s of audio: compiled in {took:.0f} s", flush=True
        )

    started, used = time.monotonic(), time.process_time()
    parallel.compile_all(jobs, devices, report)
    row = {
        "programs": len(jobs),
        "seconds": round(time.monotonic() - started),
        "cpu_seconds": round(time.process_time() - used),
        "mean_seconds": {name: round(sum(all_) / len(all_)) for name, all_ in seconds.items()},
    }
    print(
        f"{row['programs']} programs in {row['seconds']} s by the clock, {row['cpu_seconds']} s of"
        f" processor time ({row['cpu_seconds'] / 60:.1f} minutes; goal 20)"
    )
    sidebyside.write_json(arguments.json, [row])


if __name__ == "__main__":
    main()
