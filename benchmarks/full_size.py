"""XLS-R 300M at full size on this machine's CPU: written by transformers, loaded, updated once.

    python benchmarks/full_size.py [--trainable-layers N [--cached]] [--json FILE]

With --cached it also says what data.cache_features costs and saves: the pass that keeps what the
frozen layers give for the clips, and an update from that; and the feature encoder alone, whose
output is not worth keeping. These are seconds of processor time, the least of three runs.

The weights are random; shapes, files and arithmetic are those of XLS-R 300M. Needs the extra `test`
(torch writes the folder), about 12 GB of memory and 3 GB of disk.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import sidebyside
import train_step

from flax_asr import config, criterion, parallel, step
from flax_asr.data import loader
from flax_asr.models import feature_encoder, pretrained

VOCABULARY, CLIPS, SECONDS = 4000, 2, 4

WRITE = """
import json, sys, transformers
config = transformers.Wav2Vec2Config(**json.loads(sys.argv[2]))
transformers.Wav2Vec2ForPreTraining(config).save_pretrained(sys.argv[1])
"""


def measure(trainable_layers: int | None, cached: bool, small: bool) -> dict[str, float]:
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
                pathlib.Path(folder),
                head_vocab_size=VOCABULARY,
                config_overrides={"pad_token_id": 0, "ctc_loss_reduction": "mean"},
            ),
        )
    cfg = config.Config(
        data=config.DataConfig(cache_features=cached),
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
    if cached:
        figures |= _keeping(ours, batch)
    figures["peak_gigabytes"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return figures


def _keeping(ours: train_step.Ours, batch: loader.Batch) -> dict[str, float]:
    """Processor seconds with and without what the frozen layers give, and its megabytes."""
    shape = CLIPS, batch.audio.shape[1], batch.labels.shape[1]
    params = {**ours.state.trainable, **ours.state.frozen}
    (placed,) = ours.devices.micro_batches(batch, CLIPS)
    lower = parallel.lower(ours.objective, ours.devices).compile(params, placed)
    hidden_state = np.asarray(lower(params, placed))[0]
    kept = loader.CachedBatch(hidden_state, *batch[2:])
    from_kept = ours.compile_cached(*shape)
    encoder = feature_encoder.FeatureEncoder(ours.objective.config, np.float32, "none", True)
    tree = step.merge(params, {})["wav2vec2"]["feature_extractor"]
    audio = criterion.waveform(jax.tree.map(lambda a: a[0], placed), True)
    convolve = jax.jit(encoder.apply)

    def least(run) -> float:
        found = []
        for _ in range(4):  # the first one may allocate
            started = time.process_time()
            jax.block_until_ready(run())
            found.append(time.process_time() - started)
        return round(min(found[1:]), 2)

    # Before the updates, which donate the parameters.
    convolutions = least(lambda: convolve({"params": tree}, audio))
    keeping = least(lambda: lower(params, placed))
    update = least(lambda: ours.update(batch))
    cached = least(lambda: (ours.start_with(from_kept, kept), ours.state))
    return {
        "feature_encoder_processor_seconds": convolutions,
        "update_processor_seconds": update,
        "keeping_processor_seconds": keeping,
        "cached_update_processor_seconds": cached,
        "pays_after_epochs": round(keeping / (update - cached), 2),
        "kept_megabytes_an_hour": round(hidden_state.nbytes / (CLIPS * SECONDS) * 3600 / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainable-layers", type=int, default=None)
    parser.add_argument("--cached", action="store_true", help="data.cache_features as well")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--json", metavar="FILE", help="also write the result as an object there")
    arguments = parser.parse_args()
    figures = measure(arguments.trainable_layers, arguments.cached, arguments.small)
    print(
        f"{CLIPS} clips of {SECONDS} s, {VOCABULARY} symbols, fp32, {jax.devices()[0].device_kind}"
    )
    for name, value in figures.items():
        print(f"  {name:<34} {value:>10}")
    sidebyside.write_json(arguments.json, [figures])


if __name__ == "__main__":
    main()
