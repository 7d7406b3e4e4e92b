"""The train step that the benchmarks time: models, batches, and what a run executes.

Dropouts, layerdrop and SpecAugment are off, so that others can compute the same loss.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from transformers import Wav2Vec2Config

from flax_asr import compilation, config, experiment, origins, parallel
from flax_asr.data import buckets, loader

QUIET = dict.fromkeys(
    "activation_dropout attention_dropout feat_proj_dropout final_dropout hidden_dropout"
    " layerdrop mask_time_prob mask_feature_prob".split(),
    0.0,
)
XLS_R_300M = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
}
SMALL = {
    **XLS_R_300M,
    "conv_dim": [32] * 7,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
"""The same architecture, for a machine that can only say that a script works."""


def model_config(**fields: Any) -> Wav2Vec2Config:
    """A configuration in which nothing is random."""
    return Wav2Vec2Config(**QUIET | {"pad_token_id": 0, "ctc_loss_reduction": "mean"} | fields)


def batch(samples: np.ndarray, padded: int, tokens: int, symbols: int, seed: int) -> loader.Batch:
    """Noise and labels: clips of so many samples, 4 labels a second as Chinese has."""
    rng = np.random.default_rng(seed)
    rows = len(samples)
    audio = rng.integers(-9000, 9000, (rows, padded)).astype(np.int16)
    audio[np.arange(padded) >= samples[:, None]] = 0
    label_lengths = np.clip(samples // 4000, 1, tokens).astype(np.int32)
    labels = rng.integers(1, symbols, (rows, tokens)).astype(np.int32)
    labels[np.arange(tokens) >= label_lengths[:, None]] = 0
    return loader.Batch(
        audio=audio,
        gains=np.full(rows, 2.0**-15, np.float32),
        sample_lengths=samples.astype(np.int32),
        labels=labels,
        label_lengths=label_lengths,
        weights=np.ones(rows, np.float32),
    )


def full_batch(rows: int, seconds: float, symbols: int, seed: int = 0) -> loader.Batch:
    """A batch without padding."""
    padded = buckets.smallest_samples(round(seconds * 50))
    return batch(np.full(rows, padded), padded, padded // 4000, symbols, seed)


class Ours:
    """A run's train step on some devices.

    Args:
        cfg, model, params: the run, its model, and the nested parameters to begin with.
        devices: by default the first one.
        at_once: an update is one program, as in a run whose updates are one micro-batch.

    Attributes:
        compiled: the compiled `accumulate` (with `at_once`, `update_from`) of each (rows a device,
            padded samples, tokens).
        compiled_update: the compiled `update`; None with `at_once`.
        state: parameters, moments and counters.
    """

    def __init__(
        self,
        cfg: config.Config,
        model: Wav2Vec2Config,
        params: Any,
        devices: parallel.Devices | None = None,
        at_once: bool = False,
    ):
        self.devices = parallel.Devices(jax.devices()[:1]) if devices is None else devices
        self.objective = experiment.objective(
            cfg, origins.Origin(model, None, None, True, True, {})
        )
        rule = experiment.rule(cfg, 1000)
        fresh = experiment.fresh_state(cfg, model, params, rule.optimiser)
        self.state = self.devices.replicate(jax.device_get(fresh))
        self.compiled: dict[tuple[int, int, int], Any] = {}
        self._sums = self.compiled_update = None
        if at_once:
            self._learn = parallel.update_from(self.objective, rule, self.devices)
        else:
            self._learn = parallel.accumulate(self.objective, self.devices)
            self._sums = self.devices.zero_sums(self.state.trainable)
            update = parallel.update(rule, self.devices)
            self.compiled_update = update.compile(self.state, self._sums)

    def compile(self, rows: int, samples: int, tokens: int) -> Any:
        """Compiles the step for so many rows a device; gives the program."""
        shape = rows, samples, tokens
        self.compile_all([shape])
        return self.compiled[shape]

    def compile_all(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        """The same for many shapes, side by side as a run does it."""
        jobs = {
            shape: (self._learn, self._arguments(self.devices.batch_shapes(*shape)))
            for shape in shapes
        }
        self.compiled |= compilation.compile_all(jobs)

    def compile_cached(self, rows: int, samples: int, tokens: int) -> Any:
        """The same for the lower layers' output of such a batch."""
        shapes = self.devices.train_batch_shapes(self.objective, rows, samples, tokens)
        return self._learn.compile(*self._arguments(shapes))

    def _arguments(self, batch: Any) -> tuple:
        return (self.state, batch) if self._sums is None else (self.state, self._sums, batch)

    def start(self, host_batch: loader.Batch) -> Any:
        """Starts one update of one micro-batch a device; gives its metrics when they are there."""
        rows = len(host_batch.weights) // self.devices.count
        shape = rows, host_batch.audio.shape[1], host_batch.labels.shape[1]
        return self.start_with(self.compiled[shape], host_batch)

    def start_with(self, run: Any, host_batch: loader.Batch | loader.CachedBatch) -> Any:
        """The same by a program that was compiled for such a batch."""
        rows = len(host_batch.weights) // self.devices.count
        (placed,) = self.devices.micro_batches(host_batch, rows)
        if self._sums is None:
            self.state, metrics = run(self.state, placed)
        else:
            sums = run(self.state, self._sums, placed)
            self.state, self._sums, metrics = self.compiled_update(self.state, sums)
        return metrics

    def update(self, host_batch: loader.Batch) -> float:
        """One update from beginning to end; its loss."""
        metrics = jax.block_until_ready(self.start(host_batch))
        jax.block_until_ready(self.state)
        return float(metrics.loss)
