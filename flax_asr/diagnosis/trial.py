"""A few timed updates of the real compiled step, in a process that can be killed.

A compilation cannot be stopped, but a process can. The accelerator belongs to one process, so the
same process also reports the devices.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import Wav2Vec2Config

from flax_asr import compilation, config, criterion, experiment, optim, origins, parallel, step
from flax_asr.data import loader, pool
from flax_asr.models import layers, wav2vec2

_SHALLOW, _DEEPER = 1, 3
_CAUTION = 1.5
_REPEATS = 5
_REPEAT_SECONDS = 2.0
_PRODUCT_SIZES = {"cpu": 1024, "gpu": 8192, "tpu": 8192}


class Machine(NamedTuple):
    """The devices, and the speed of one of them in a large matrix product.

    `memory_bytes` is a device's own memory, None where it shares the host's.
    """

    platform: str
    kind: str
    count: int
    memory_bytes: int | None
    flops_per_second: float


class Look(NamedTuple):
    """A request to report the devices and their speed in this precision."""

    mixed_precision: str


class Asked(NamedTuple):
    """A request to time a micro-batch and an update: the run, the model, the shape, the limit."""

    cfg: config.Config
    model_config: dict[str, Any]
    do_normalize: bool
    use_attention_mask: bool
    samples: int
    tokens: int
    limit_seconds: float


class Timed(NamedTuple):
    """Measured times; `temporary_bytes` is memory of a device besides state and batch.

    `layers` is the number of layers that were timed: fewer than the model has if the rest would
    have taken too long, and is extrapolated.
    """

    accumulate_seconds: float
    update_seconds: float
    compile_seconds: float
    temporary_bytes: int
    layers: int


def run(
    asked: Asked | None, limit_seconds: float
) -> tuple[Machine | pool.Failure, Timed | pool.Failure | None]:
    """The devices and, if `asked`, the times; each may be a failure, also by taking too long."""
    mixed_precision = "fp32" if asked is None else asked.cfg.train.mixed_precision
    tasks = [(None, Look(mixed_precision)), *([(None, asked)] if asked is not None else [])]
    with contextlib.closing(
        pool.run_ordered(answer, tasks, workers=1, limit_seconds=limit_seconds)
    ) as results:
        answers = [result for _, result in results]
    return answers[0], answers[1] if asked is not None else None


def answer(task: Look | Asked) -> Machine | Timed:
    """Answers a request, in the trial's process."""
    return _machine(task.mixed_precision) if isinstance(task, Look) else _timed(task)


def _machine(mixed_precision: str) -> Machine:
    devices = parallel.Devices()
    device = devices.devices[0]
    memory = device.memory_stats() or {}
    size = _PRODUCT_SIZES[devices.platform]
    matrix = jnp.full((size, size), 1e-3, experiment.DTYPES[mixed_precision])
    product = jax.jit(_product).lower(matrix).compile()
    seconds = min(_repeated(lambda: product(matrix)))
    return Machine(
        platform=devices.platform,
        kind=device.device_kind,
        count=devices.count,
        memory_bytes=memory.get("bytes_limit"),
        flops_per_second=2.0 * size**3 / seconds,
    )


def _product(matrix: jax.Array) -> jax.Array:
    """A product in the model's precision: the default for float32 on GPU and TPU is coarser."""
    return jnp.matmul(matrix, matrix, precision=layers.precision(matrix.dtype))


def _timed(asked: Asked) -> Timed:
    """Times of the whole model if that is fast enough, else extrapolated from two shallow ones."""
    layers = Wav2Vec2Config(**asked.model_config).num_hidden_layers
    model = asked.cfg.model
    if asked.cfg.data.cache_features and model.trainable_layers is not None:
        # Batches start above the frozen layers, so a model of the trained layers takes as long.
        trained = min(layers, max(1, model.trainable_layers))
        return _timed_with(asked, trained, trained)._replace(layers=layers)
    if layers <= _DEEPER:
        return _timed_with(asked, layers, layers)
    began = time.monotonic()
    shallow, deeper = (_timed_with(asked, count, _SHALLOW) for count in (_SHALLOW, _DEEPER))
    whole = _extended(asked.cfg.model.trainable_layers, layers, shallow, deeper)
    needed = _CAUTION * (
        whole.compile_seconds + (_REPEATS + 1) * (whole.accumulate_seconds + whole.update_seconds)
    )
    if needed < asked.limit_seconds - (time.monotonic() - began):
        return _timed_with(asked, layers, layers)
    return whole


def _extended(trainable_layers: int | None, layers: int, shallow: Timed, deeper: Timed) -> Timed:
    """Times of all layers, each costing as much as one of those by which the two models differ.

    With `trainable_layers` those are not trained; a trained layer costs three times as much.
    """
    more = layers - _SHALLOW
    worth = float(more)
    if trainable_layers is not None:
        trained = max(0, min(trainable_layers, layers) - _SHALLOW)
        worth += 2 * trained

    def grown(name: str, by: float) -> float:
        low, high = getattr(shallow, name), getattr(deeper, name)
        return low + max(0.0, high - low) / (_DEEPER - _SHALLOW) * by

    return Timed(
        accumulate_seconds=grown("accumulate_seconds", worth),
        update_seconds=grown("update_seconds", more),
        compile_seconds=grown("compile_seconds", more),
        temporary_bytes=round(grown("temporary_bytes", more)),
        layers=_DEEPER,
    )


def _timed_with(asked: Asked, layers: int, trained: int) -> Timed:
    """Times of a model of so many layers, of which at most `trained` are trained."""
    cfg, devices = _with_trained(asked.cfg, trained), parallel.Devices()
    model_config = Wav2Vec2Config(**(asked.model_config | {"num_hidden_layers": layers}))
    origin = origins.Origin(
        model_config, None, None, asked.do_normalize, asked.use_attention_mask, {}
    )
    objective = experiment.objective(cfg, origin)
    learning_rate = optim.schedule(cfg.optim, max(1, cfg.optim.warmup_steps) * 10)
    # The update of all parameters, as after model.freeze_encoder_steps.
    rule = step.Rule(optim.adamw(cfg.optim, learning_rate), learning_rate, cfg.optim.ema_decay)
    # Any weights take as long as any others; these keep every figure finite.
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.random(leaf.shape, np.float32) * 0.02 + 0.01,
        experiment.parameter_shapes(objective),
    )
    fresh = jax.device_get(experiment.fresh_state(cfg, model_config, params, rule.optimiser))
    layout = experiment.layout(cfg, fresh, devices.count)
    state = devices.place(fresh, layout.state)
    sums = devices.zero_sums(state.trainable)
    per_device = cfg.train.per_device_train_batch_size
    host_batch = _batch(devices.local_count * per_device, asked.samples, asked.tokens)
    if objective.lower_layers is not None:
        host_batch = _cached(host_batch, objective)
    (batch,) = devices.micro_batches(host_batch, per_device)
    started = time.monotonic()
    programs = compilation.compile_all(
        {
            "accumulate": (parallel.accumulate(objective, devices, layout), (state, sums, batch)),
            "update": (parallel.update(rule, devices, layout), (state, sums)),
        }
    )
    compile_seconds = time.monotonic() - started

    def accumulate():
        nonlocal sums
        sums = programs["accumulate"](state, sums, batch)
        return sums

    def update():
        nonlocal state, sums
        state, sums, metrics = programs["update"](state, sums)
        return metrics

    return Timed(
        accumulate_seconds=float(np.median(list(_repeated(accumulate)))),
        update_seconds=float(np.median(list(_repeated(update)))),
        compile_seconds=compile_seconds,
        temporary_bytes=programs["accumulate"].memory_analysis().temp_size_in_bytes,
        layers=layers,
    )


def _with_trained(cfg: config.Config, layers: int) -> config.Config:
    """The configuration with at most so many `trainable_layers`, if it sets them."""
    if cfg.model.trainable_layers is None:
        return cfg
    fewer = min(cfg.model.trainable_layers, layers)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, trainable_layers=fewer))


def _batch(rows: int, samples: int, tokens: int) -> loader.Batch:
    rng = np.random.default_rng(0)
    return loader.Batch(
        audio=rng.integers(-3000, 3000, (rows, samples), np.int16),
        gains=np.full(rows, 1 / 32768, np.float32),
        sample_lengths=np.full(rows, samples, np.int32),
        labels=np.tile(np.arange(tokens, dtype=np.int32) % 2 + 1, (rows, 1)),
        label_lengths=np.full(rows, tokens, np.int32),
        weights=np.ones(rows, np.float32),
    )


def _cached(batch: loader.Batch, objective: criterion.Objective) -> loader.CachedBatch:
    frames = int(wav2vec2.frame_lengths(objective.config, batch.audio.shape[1]))
    shape = len(batch.weights), frames, objective.config.hidden_size
    return loader.CachedBatch(np.full(shape, 0.1, objective.module.dtype), *batch[2:])


def _repeated(function) -> Iterator[float]:
    """Seconds of several calls; the first, which may allocate, counts only if calls are slow."""
    spent = 0.0
    for call in range(_REPEATS + 1):
        started = time.perf_counter()
        jax.block_until_ready(function())
        seconds = time.perf_counter() - started
        spent += seconds
        slow = spent > _REPEAT_SECONDS
        if call > 0 or slow:
            yield seconds
        if slow:
            return
