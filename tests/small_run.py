"""A small run without files: batches of speech-like noise and updates over some fake devices."""

import dataclasses

import jax
import numpy as np

from flax_asr import config, criterion, experiment, origins, parallel, step
from flax_asr.data import loader

SAMPLES, TOKENS = 1600, 8
_ACCUMULATE: dict = {}
_UPDATE: dict = {}


def batch(rows: int, seed: int, vocab: int, samples: int = SAMPLES, fillers: int = 0):
    """Clips of different lengths, gains and labels; the last `fillers` rows are empty."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(samples // 2, samples + 1, rows).astype(np.int32)
    label_lengths = rng.integers(1, TOKENS + 1, rows).astype(np.int32)
    weights = np.ones(rows, np.float32)
    for count in (lengths, label_lengths, weights):
        count[rows - fillers :] = 0
    real = np.arange(samples) < lengths[:, None]
    envelope = 1 + np.sin(np.arange(samples) / rng.uniform(40, 90, (rows, 1)))
    audio = rng.normal(0, 3000, (rows, samples)) * envelope
    labels = rng.integers(1, vocab, (rows, TOKENS)) * (np.arange(TOKENS) < label_lengths[:, None])
    return loader.Batch(
        audio=np.clip(audio * real, -32768, 32767).astype(np.int16),
        gains=rng.uniform(1e-5, 1e-4, rows).astype(np.float32),
        sample_lengths=lengths,
        labels=labels.astype(np.int32),
        label_lengths=label_lengths,
        weights=weights,
    )


def joined(*batches):
    """One batch of all rows."""
    return loader.Batch(*(np.concatenate(columns) for columns in zip(*batches, strict=True)))


def objective(model_config, mixed_precision: str = "fp32", **changes) -> criterion.Objective:
    cfg = config.Config(train=config.TrainConfig(mixed_precision=mixed_precision))
    start = origins.Origin(model_config, None, None, True, True, {})
    return dataclasses.replace(experiment.objective(cfg, start), **changes)


class Trainer:
    """Updates from nested parameters, on the first `devices` fake devices."""

    def __init__(
        self,
        objective,
        params,
        updates=100,
        devices=1,
        mixed_precision="fp32",
        clips_an_update=None,
        zero_sharding=False,
        **sections,
    ):
        self.cfg = config.Config(
            optim=config.OptimConfig(**sections.get("optim", {})),
            model=config.ModelConfig(**sections.get("model", {})),
            train=config.TrainConfig(mixed_precision=mixed_precision, zero_sharding=zero_sharding),
        )
        self.devices = parallel.Devices(jax.devices()[:devices])
        self.frozen_steps = self.cfg.model.freeze_encoder_steps
        self.rule = experiment.rule(self.cfg, updates)._replace(clips_an_update=clips_an_update)
        fresh = experiment.fresh_state(self.cfg, objective.config, params, self.rule.optimiser)
        self.layout = experiment.layout(self.cfg, fresh, devices)
        self.state = self.devices.place(jax.device_get(fresh), self.layout.state)
        self.sums = self.devices.zero_sums(self.state.trainable)
        # compiled once for all tests that ask for the same
        cuts = (devices, mixed_precision if zero_sharding else None, *self.layout.axes.items())
        kind = (objective.config.to_json_string(), str(objective.module.dtype), cuts)
        accumulate = parallel.accumulate(objective, self.devices, self.layout)
        self.accumulate = _ACCUMULATE.setdefault(kind, accumulate)
        head_only = parallel.accumulate(objective, self.devices, self.layout, head_only=True)
        self.accumulate_head = _ACCUMULATE.setdefault((*kind, "head"), head_only)
        settings = (self.cfg.optim, self.frozen_steps, updates, cuts, clips_an_update)
        update = parallel.update(self.rule, self.devices, self.layout)
        self._update = _UPDATE.setdefault(settings, update)

    def update(self, *groups) -> step.Metrics:
        """One update from these groups, each split over the devices."""
        frozen = int(self.state.step) < self.frozen_steps
        accumulate = self.accumulate_head if frozen else self.accumulate
        for group in groups:
            per_device = len(group.weights) // self.devices.count
            for micro in self.devices.micro_batches(group, per_device):
                self.sums = accumulate(self.state, self.sums, micro)
        self.state, self.sums, metrics = self._update(self.state, self.sums)
        return jax.device_get(metrics)

    @property
    def params(self) -> dict[str, np.ndarray]:
        """Flat, on the host."""
        return jax.device_get({**self.state.trainable, **self.state.frozen})
