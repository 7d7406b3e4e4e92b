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

from flax_asr import config, experiment, optim, parallel
from flax_asr.data import buckets, loader
from flax_asr.models import pretrained

VOCABULARY, CLIPS, SECONDS, TOKENS = 4000, 2, 4, 16

WRITE = """
import sys, transformers
config = transformers.Wav2Vec2Config(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
    feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
transformers.Wav2Vec2ForPreTraining(config).save_pretrained(sys.argv[1])
"""


def measure(trainable_layers: int | None) -> dict[str, float]:
    """Seconds and gigabytes of each stage."""
    figures: dict[str, float] = {}

    def timed(name: str, function):
        started = time.monotonic()
        result = jax.block_until_ready(function())
        figures[name] = round(time.monotonic() - started, 2)
        return result

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", WRITE, folder], check=True, capture_output=True)
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
    objective = experiment.objective(
        cfg, experiment.Origin(loaded.config, None, None, True, True, {})
    )
    devices = parallel.Devices(jax.devices()[:1])
    learning_rate = optim.schedule(cfg.optim, 100)
    optimiser = optim.adamw(cfg.optim, learning_rate)
    fresh = experiment.fresh_state(cfg, loaded.params, optimiser)
    figures["weights_millions"] = round(
        sum(leaf.size for leaf in jax.tree.leaves(loaded.params)) / 1e6, 1
    )
    figures["trained_millions"] = round(
        sum(leaf.size for leaf in fresh.trainable.values()) / 1e6, 1
    )
    state = devices.replicate(jax.device_get(fresh))
    sums = devices.zero_sums(state.trainable)
    batch = next(devices.micro_batches(_batch(), CLIPS))
    accumulate = parallel.accumulate(objective, devices)
    update = parallel.update(optimiser, learning_rate, devices)
    compiled = timed("compile_seconds", lambda: accumulate.lower(state, sums, batch).compile())
    compiled_update = update.lower(state, sums).compile()

    def once():
        return compiled_update(state, compiled(state, sums, batch))

    state, sums, _ = timed("first_update_seconds", once)
    _, _, metrics = timed("update_seconds", once)
    if not np.isfinite(metrics.loss):
        raise SystemExit("the loss of the update is not finite")
    figures["loss"] = round(float(metrics.loss), 2)
    figures["peak_gigabytes"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return figures


def _batch() -> loader.Batch:
    samples = buckets.smallest_samples(SECONDS * 50)
    rng = np.random.default_rng(0)
    return loader.Batch(
        audio=rng.integers(-9000, 9000, (CLIPS, samples)).astype(np.int16),
        gains=np.full(CLIPS, 2.0**-15, np.float32),
        sample_lengths=np.full(CLIPS, samples, np.int32),
        labels=rng.integers(1, VOCABULARY, (CLIPS, TOKENS)).astype(np.int32),
        label_lengths=np.full(CLIPS, TOKENS, np.int32),
        weights=np.ones(CLIPS, np.float32),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainable-layers", type=int, default=None)
    parser.add_argument("--json", default=None)
    arguments = parser.parse_args()
    figures = measure(arguments.trainable_layers)
    print(
        f"{CLIPS} clips of {SECONDS} s, {VOCABULARY} symbols, fp32, {jax.devices()[0].device_kind}"
    )
    for name, value in figures.items():
        print(f"  {name:<22} {value:>10}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
