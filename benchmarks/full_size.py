"""XLS-R 300M at full size on this machine's CPU: written by transformers, loaded, updated once.

    python benchmarks/full_size.py [--trainable-layers N] [--json FILE]

The weights are random; shapes, files and arithmetic are those of XLS-R 300M. Needs
the extra `test` (torch writes the folder), about 12 GB of memory and 3 GB of disk.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import sidebyside
import train_step

from flax_asr import config
from flax_asr.models import pretrained

VOCABULARY, CLIPS, SECONDS = 4000, 2, 4

WRITE = """
import json, sys, transformers
config = transformers.Wav2Vec2Config(**json.loads(sys.argv[2]))
transformers.Wav2Vec2ForPreTraining(config).save_pretrained(sys.argv[1])
"""


def measure(trainable_layers: int | None, small: bool) -> dict[str, float]:
    """Seconds and gigabytes of each stage."""
    figures: dict[str, float] = {}

    def timed(name: str, function):
        started = time.monotonic()
        result = jax.block_until_ready(function())
        figures[name] = round(time.monotonic() - started, 2)
        return result

    with tempfile.TemporaryDirectory() as folder:
        shape = json.dumps(train_step.SMALL if small else train_step.XLS_R_300M)
        writing = [sys.executable, "-c", WRITE, folder, shape]
        subprocess.run(writing, check=True, capture_output=True)
        loaded = timed(
            "load_seconds",
            lambda: pretrained.load(
                folder,
                head_vocab_size=VOCABULARY,
                config_overrides={"pad_token_id": 0, "ctc_loss_reduction": "mean"},
            ),
        )
    cfg = config.Config(
        model=config.ModelConfig(trainable_layers=trainable_layers),
        train=config.TrainConfig(mixed_precision="fp32"),
    )
    ours = train_step.Ours(cfg, loaded.config, loaded.params)
    trained = jax.tree.leaves(ours.state.trainable)
    weights = trained + jax.tree.leaves(ours.state.frozen)
    figures["weights_millions"] = round(sum(leaf.size for leaf in weights) / 1e6, 1)
    figures["trained_millions"] = round(sum(leaf.size for leaf in trained) / 1e6, 1)
    del loaded
    batch = train_step.full_batch(CLIPS, SECONDS, VOCABULARY)
    shape = CLIPS, batch.audio.shape[1], batch.labels.shape[1]
    timed("compile_seconds", lambda: ours.compile(*shape))
    timed("first_update_seconds", lambda: ours.update(batch))
    loss = timed("update_seconds", lambda: ours.update(batch))
    if not np.isfinite(loss):
        raise SystemExit("the loss of the update is not finite")
    figures["loss"] = round(loss, 2)
    figures["peak_gigabytes"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainable-layers", type=int, default=None)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--json", metavar="FILE", help="also write the result as an object there")
    arguments = parser.parse_args()
    figures = measure(arguments.trainable_layers, arguments.small)
    print(
        f"{CLIPS} clips of {SECONDS} s, {VOCABULARY} symbols, fp32, {jax.devices()[0].device_kind}"
    )
    for name, value in figures.items():
        print(f"  {name:<22} {value:>10}")
    sidebyside.write_json(arguments.json, [figures])


if __name__ == "__main__":
    main()
