"""Time of one train step on a CPU, against PyTorch and transformers on the same work.

    python benchmarks/cpu_step.py [--layers 2] [--cores 1] [--runs 7] [--train-feature-encoder]

XLS-R's widths, 2 clips of 4 s, 4000 symbols, float32, clipping and AdamW; the feature encoder is
frozen unless asked otherwise. Both start from the same weights; the losses of the first three
updates are compared before anything is timed, so that the work is the same. The two take turns on
the same cores; medians and their ratio. With one core it is processor time, which other programs on
the machine hardly change; with more it is the clock's.
"""

import argparse
import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import sidebyside
import torch
import torch_step
import train_step
import transformers

from flax_asr import config

SYMBOLS, CLIPS, SECONDS = 4000, 2, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--train-feature-encoder", action="store_true")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--json", metavar="FILE", help="also write the result as an object there")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-arguments.cores :])
    torch.set_num_threads(arguments.cores)  # XLA counts the cores it may use
    cfg = config.build(
        {
            "model": {"freeze_feature_encoder": not arguments.train_feature_encoder},
            "optim": {"learning_rate": 1e-6, "lr_scheduler_type": "constant"},
            "train": {"mixed_precision": "fp32", "max_steps": 1000},
        }
    )
    widths = train_step.SMALL if arguments.small else train_step.XLS_R_300M
    model = train_step.model_config(
        **widths | {"num_hidden_layers": arguments.layers, "vocab_size": SYMBOLS}
    )
    theirs = torch_step.PyTorch(cfg, model)
    ours = train_step.Ours(cfg, model, theirs.params())
    batch = train_step.full_batch(CLIPS, SECONDS, SYMBOLS)
    ours.compile(CLIPS, batch.audio.shape[1], batch.labels.shape[1])
    ways = {"ours": ours, "PyTorch": theirs}
    losses = {name: [way.update(batch) for _ in range(3)] for name, way in ways.items()}
    np.testing.assert_allclose(losses["ours"], losses["PyTorch"], rtol=1e-3)

    median = sidebyside.medians(
        {name: lambda way=way: way.update(batch) for name, way in ways.items()},
        arguments.runs,
        clock=time.process_time if arguments.cores == 1 else time.perf_counter,
    )
    ratio = median["ours"] / median["PyTorch"]
    print(f"{CLIPS} x {SECONDS} s, {arguments.layers} layers, {SYMBOLS} symbols, float32")
    print(
        f"jax {jax.__version__}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}, {torch.get_num_threads()} threads"
    )
    print("losses of the first updates:", [round(loss, 4) for loss in losses["ours"]])
    print(
        f"ours {1e3 * median['ours']:.0f} ms, PyTorch {1e3 * median['PyTorch']:.0f} ms: {ratio:.3f}"
    )
    row = {f"{name.lower()}_seconds": round(value, 4) for name, value in median.items()}
    sidebyside.write_json(arguments.json, [row | {"of_pytorch": round(ratio, 3)}])


if __name__ == "__main__":
    main()
