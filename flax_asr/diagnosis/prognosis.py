"""What a run will take, from what `doctor` has seen: batches and updates, time, disk and memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flax_asr import (
    audio,
    batch_size,
    config,
    corpora,
    early_stopping,
    experiment,
    optim,
    origins,
    partition,
)
from flax_asr.data import buckets, pool, prepared_dir
from flax_asr.diagnosis import findings, survey, trial
from flax_asr.estimate import forecast
from flax_asr.models import wav2vec2

CHEAP_LAYERS = 2
"""Trainable layers of the cheaper alternative that is offered."""


@dataclass(frozen=True)
class Seen:
    """What is known about the run.

    Attributes:
        start: the model, with the vocabulary's size.
        corpus: the clips whose length is known.
        splits: all clips, by the name of their split.
        shapes: padded samples of each bucket.
        asked, devices, timed: the trial and its results.
        fresh_head: whether the head starts from random numbers.
        machine: the facts of `host`.
    """

    start: origins.Origin
    corpus: corpora.Corpus
    splits: Mapping[str, survey.Split]
    shapes: tuple[int, ...]
    asked: trial.Asked
    devices: trial.Machine
    timed: trial.Timed | pool.Failure | None
    fresh_head: bool
    machine: Mapping[str, Any]


class Prognosis:
    """The prognosis of one configuration.

    Attributes:
        facts: `batches`, `time` and `room`, for programs.
        findings: problems found in them.

    Raises:
        ConfigError: the batch does not fit the devices, or early stopping has no scores.
    """

    def __init__(self, cfg: config.Config, seen: Seen):
        early_stopping.check(cfg)
        self.cfg = batch_size.resolve(cfg, seen.devices.count)
        self.seen = seen
        self.facts: dict[str, Any] = {}
        self.findings: list[findings.Finding] = []
        self._rows = seen.devices.count * self.cfg.train.per_device_train_batch_size
        self._batches()
        self._time()
        self._room()

    def _batches(self) -> None:
        cfg, seen = self.cfg, self.seen
        train = seen.corpus.train
        plan = experiment.train_plan(cfg, train.samples, seen.shapes, self._rows)
        splits = [seen.splits[name] for name in cfg.data.train_splits]
        usable = survey.usable(train, splits, cfg.data.max_train_clips)
        updates_per_epoch = buckets.updates_per_epoch(
            usable, plan.group_rows, plan.groups_per_update, plan.leaks
        )
        updates = experiment.total_updates(cfg.train, updates_per_epoch)
        mean_seconds = float((train.samples / audio.SAMPLE_RATE_HZ).mean())
        self.facts["batches"] = {
            "train_clips": usable,
            "train_hours": usable * mean_seconds / 3600,
            "global_batch_size": cfg.train.global_batch_size,
            "micro_batches_an_update": plan.groups_per_update,
            "padding": plan.padding,
            "updates_per_epoch": updates_per_epoch,
            "updates": updates,
            "epochs": updates / updates_per_epoch,
        }
        model_config = seen.start.model_config
        group_norm = model_config.feat_extract_norm == "group"
        most_frames = int(wav2vec2.frame_lengths(model_config, train.samples.max()))
        self.findings += findings.without_effect(cfg, model_config, most_frames)
        self.findings += findings.batches(cfg, plan.padding, group_norm)
        self.findings += findings.schedule(cfg, updates, seen.fresh_head)
        self.findings += findings.precision(cfg.train.mixed_precision, seen.devices.platform)

    def _work(self) -> forecast.Work:
        cfg, seen, batches = self.cfg, self.seen, self.facts["batches"]
        scored_samples = 0.0
        if seen.corpus.eval is not None:
            splits = [seen.splits[name] for name in cfg.data.eval_splits]
            clips = survey.usable(seen.corpus.eval, splits, cfg.data.max_eval_clips)
            times = math.ceil(batches["updates"] / cfg.train.eval_steps)
            scored_samples = clips * float(seen.corpus.eval.samples.mean()) * times
        cached = cfg.data.cache_features and cfg.model.trainable_layers is not None
        if cached:
            scored_samples += batches["train_clips"] * float(seen.corpus.train.samples.mean())
        trained_clips = batches["updates"] * cfg.train.global_batch_size
        trained_samples = trained_clips * float(seen.corpus.train.samples.mean())
        real = 1 - batches["padding"]
        return forecast.Work(
            model_config=seen.start.model_config,
            model=cfg.model,
            trained_samples=trained_samples / real,
            scored_samples=scored_samples / real,
            updates=batches["updates"],
            cached=cached,
        )

    def _time(self) -> None:
        cfg, seen, work = self.cfg, self.seen, self._work()
        timed, samples = seen.timed, seen.asked.samples
        measured = isinstance(timed, trial.Timed)
        if measured:
            samples_per_second = self._rows * samples / timed.accumulate_seconds
            seconds = work.seconds_at(samples, samples_per_second, timed.update_seconds)
        else:
            # Several devices of a CPU are the same CPU.
            count = 1 if seen.devices.platform == "cpu" else seen.devices.count
            seconds = work.least_seconds(samples, seen.devices.flops_per_second * count)
        cheap = None
        layers = seen.start.model_config.num_hidden_layers
        if cfg.model.trainable_layers is None and layers > CHEAP_LAYERS:
            cheap = seconds * work.relative_cost(CHEAP_LAYERS, samples)
        self.facts["time"] = {
            "measured": measured,
            "update_on_samples": samples,
            "whole_model": measured and timed.layers == layers,
            "trial": timed._asdict() if timed is not None else None,
            "seconds": seconds,
            "days": seconds / 86400,
            "cheap_trainable_layers": CHEAP_LAYERS if cheap is not None else None,
            "cheap_days": cheap / 86400 if cheap is not None else None,
        }
        way_out = (CHEAP_LAYERS, cheap / 86400) if cheap is not None else None
        self.findings += findings.duration(seconds / 86400, way_out, least=not measured)

    def _room(self) -> None:
        cfg, seen = self.cfg, self.seen
        optimiser = optim.adamw(cfg.optim, optim.schedule(cfg.optim, 1))
        state = jax.eval_shape(
            lambda params: experiment.fresh_state(cfg, seen.start.model_config, params, optimiser),
            experiment.parameter_shapes(experiment.objective(cfg, seen.start)),
        )
        weights = partition.tree_bytes((state.trainable, state.frozen))
        checkpoint, gradients = map(partition.tree_bytes, (state, state.trainable))
        kept = checkpoint * (cfg.train.save_total_limit + 1)
        disk, memory = seen.machine["disk"], seen.machine["memory_bytes"]
        self.findings += findings.unwritable("output_dir", disk["output_dir"])
        prepared = 0
        if not prepared_dir.is_prepared(cfg):
            if disk["prepared"]["path"] != disk["output_dir"]["path"]:
                self.findings += findings.unwritable("data.prepared_dir", disk["prepared"])
            seconds = [split.seconds for split in seen.splits.values()]
            prepared = sum(round(each * audio.SAMPLE_RATE_HZ * 2) for each in seconds)
        features = self._features_bytes()
        temporary = seen.timed.temporary_bytes if isinstance(seen.timed, trial.Timed) else 0
        layout = experiment.layout(cfg, state, seen.devices.count)
        held = partition.device_bytes(state, layout.state, seen.devices.count)
        per_device = held + gradients + temporary
        self.facts["room"] = {
            "parameters": weights // 4,
            "trained_parameters": gradients // 4,
            "checkpoint_bytes": checkpoint,
            "checkpoints_bytes": kept,
            "export_bytes": weights,
            "prepared_bytes": prepared,
            "features_bytes": features,
            "device_bytes": per_device,
        }
        need = {"output_dir": kept + weights, "prepared": prepared + features}
        if disk["output_dir"]["device"] == disk["prepared"]["device"]:
            need = {"output_dir": kept + weights + prepared + features}
        for name, count in need.items():
            free = disk[name]["free_bytes"]
            self.findings += findings.room(count, free, f"disk of {disk[name]['path']}", True)
        of_device = seen.devices.memory_bytes
        if of_device is not None:
            self.findings += findings.room(per_device, of_device, "memory of a device", True)
        elif seen.devices.platform == "cpu":
            self.findings += findings.room(per_device, memory, "memory of this machine", True)

    def _features_bytes(self) -> int:
        """Bytes that data.cache_features writes."""
        if not self.cfg.data.cache_features:
            return 0
        model = self.seen.start.model_config
        samples = self.facts["batches"]["train_hours"] * 3600 * audio.SAMPLE_RATE_HZ
        dtype = np.dtype(experiment.DTYPES[self.cfg.train.mixed_precision])
        frame_bytes = model.hidden_size * dtype.itemsize
        return round(samples / math.prod(model.conv_stride) * frame_bytes)
