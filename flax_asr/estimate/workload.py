"""The shapes and sizes of a planned run: from its prepared data, or guessed and reported so."""

import collections
import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from transformers import Wav2Vec2Config

from flax_asr import (
    audio,
    config,
    corpora,
    criterion,
    experiment,
    feature_cache,
    languages,
    optim,
    origins,
    partition,
    programs,
    static_shapes,
    step,
)
from flax_asr.data import buckets, loader, prepared_dir
from flax_asr.estimate import flops
from flax_asr.models import configuration, wav2vec2

LABELS_PER_SECOND = 16
SYMBOLS, SYMBOLS_UNSPACED = 64, 4000
PLANNED_UPDATES = 10_000

_XLS_R = {
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "feat_proj_dropout": 0.1,
    "final_dropout": 0.0,
    "mask_time_prob": 0.075,
}
KNOWN: dict[str, dict[str, Any]] = {
    f"facebook/wav2vec2-{name}": {
        **_XLS_R,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "intermediate_size": wide,
    }
    for name, hidden, layers, wide in (
        ("large-xlsr-53", 1024, 24, 4096),
        ("xls-r-300m", 1024, 24, 4096),
        ("xls-r-1b", 1280, 48, 5120),
        ("xls-r-2b", 1920, 48, 7680),
    )
}
"""Configurations of well-known encoders, so that planning downloads no weights.

Source: their config.json on the Hugging Face hub.
"""


class Data(NamedTuple):
    """What a run takes from its data, measured or guessed.

    Attributes:
        symbols: size of the vocabulary.
        train_shapes: shapes of training batches.
        train_portions: fraction of the micro-batches that are of each shape.
        eval_shapes: shapes of scored batches, empty if nothing is scored.
        scored_groups: batches of each shape in a pass over the eval and the test splits, by "eval"
            and "test"; None without data.
        audio_seconds: audio in an update.
        updates: updates of the run, None if it cannot be known.
        guesses: what was guessed, for people.
    """

    symbols: int
    train_shapes: static_shapes.Shapes
    train_portions: tuple[float, ...]
    eval_shapes: static_shapes.Shapes
    scored_groups: dict[str, tuple[int, ...]] | None
    audio_seconds: float
    updates: int | None
    guesses: tuple[str, ...]

    @property
    def planned_updates(self) -> int:
        """Updates of the run, or `PLANNED_UPDATES` if that cannot be known."""
        return PLANNED_UPDATES if self.updates is None else self.updates


@dataclass(frozen=True)
class Workload:
    """What a run computes: its functions and shapes, without values.

    Attributes:
        objective: the model and its loss.
        state: shapes of the training state.
        layout: which arrays of the state are divided among the devices.
        device_count: number of devices.
        rule: how an update changes the parameters.
        is_trained: whether the parameter of a path gets a gradient.
        data: what the run takes from its data.
    """

    objective: criterion.Objective
    state: step.TrainState
    layout: partition.Layout
    device_count: int
    rule: step.Rule
    is_trained: Callable[[str], bool]
    data: Data

    @property
    def state_bytes(self) -> int:
        """Size of the state on a device."""
        return partition.device_bytes(self.state, self.layout.state, self.device_count)

    @property
    def moment_bytes(self) -> int:
        """Size of the optimiser's moments on a device, part of `state_bytes`."""
        return partition.device_bytes(
            self.state.optimiser, self.layout.state.optimiser, self.device_count
        )

    def steps(self, cfg: config.Config) -> programs.Steps:
        """What the programs of the run are made of."""
        return programs.Steps(
            cfg,
            self.objective,
            self.rule,
            self.layout,
            self.state,
            self.data.train_shapes,
            self.data.eval_shapes,
        )

    def flops(self, function: str, rows: int, samples: int) -> int:
        """Operations of one call on a device; 0 for `update`, which has no matrix products."""
        if function == "update":
            return 0
        model_config = self.objective.config
        if function == "evaluate":
            return sum(flops.forward(model_config, rows, samples).values())
        head_only = function == "accumulate_head"
        counted = flops.gradient(
            model_config,
            rows,
            samples,
            (lambda path: path.startswith(optim.HEAD)) if head_only else self.is_trained,
            self.objective.lower_layers,
        )
        return sum(counted.values())

    @property
    def zero_sharding_bytes(self) -> int:
        """Memory that train.zero_sharding saves, or would save, on a device."""
        axes = partition.layout(self.state, self.device_count).state
        whole, cut = (
            partition.device_bytes(self.state, axes, devices) for devices in (1, self.device_count)
        )
        return whole - cut


def of(cfg: config.Config, device_count: int) -> Workload:
    """The workload of a configuration that `batch_size.resolve` has completed.

    Raises:
        FlaxAsrError: the model or the prepared data cannot be used.
    """
    start = origin(cfg.model)
    feature_cache.check(cfg, start)
    if is_prepared(cfg):
        data = _measured(cfg, start, corpora.prepared(cfg, start), device_count)
    else:
        data = _guessed(cfg, start)
    model_config = copy.deepcopy(start.model_config)
    configuration.override(model_config, {"vocab_size": data.symbols, "pad_token_id": 0})
    start = dataclasses.replace(start, model_config=model_config)
    objective = experiment.objective(cfg, start)
    rule = experiment.rule(cfg, data.planned_updates)
    params = experiment.parameter_shapes(objective)
    state = jax.eval_shape(
        lambda p: experiment.fresh_state(cfg, model_config, p, rule.optimiser), params
    )
    return Workload(
        objective=objective,
        state=state,
        layout=experiment.layout(cfg, state, device_count),
        device_count=device_count,
        rule=rule,
        is_trained=optim.trainable(cfg.model, model_config),
        data=data,
    )


def origin(model: config.ModelConfig) -> origins.Origin:
    """Like `origins.read`, without a download for well-known encoders."""
    if model.pretrained in KNOWN:
        known = {**KNOWN[model.pretrained], **model.config}
        return origins.read(dataclasses.replace(model, pretrained=None, config=known))
    return origins.read(model)


def is_prepared(cfg: config.Config) -> bool:
    """Whether every split that the run needs has been prepared."""
    data = cfg.data
    if data.language is None or (
        data.prepared_dir is None and None in (data.source, cfg.output_dir)
    ):
        return False
    return prepared_dir.is_prepared(cfg)


def _measured(
    cfg: config.Config, start: origins.Origin, corpus: corpora.Corpus, device_count: int
) -> Data:
    train, scored = cfg.train, corpus.scored()
    train_shapes = static_shapes.training(cfg, start.model_config, corpus.train)
    eval_shapes = static_shapes.scoring(cfg, start.model_config, list(scored.values()))
    rows = device_count * train.per_device_train_batch_size
    plan = experiment.train_plan(cfg, corpus.train.samples, train_shapes.samples, rows)
    epoch = plan.updates_per_epoch
    counted = collections.Counter(group.shape for u in range(epoch) for group in plan.update(u))
    portions = [counted[shape] / counted.total() for shape in range(len(train_shapes.samples))]
    return Data(
        symbols=corpus.vocabulary.size,
        train_shapes=train_shapes,
        train_portions=tuple(portions),
        eval_shapes=eval_shapes,
        scored_groups={
            name: _groups(data.samples, eval_shapes.samples, train, device_count)
            for name, data in scored.items()
        },
        audio_seconds=float(corpus.train.samples.sum()) / audio.SAMPLE_RATE_HZ / epoch,
        updates=experiment.total_updates(train, epoch),
        guesses=(),
    )


def _groups(samples, shapes, train: config.TrainConfig, device_count: int) -> tuple[int, ...]:
    rows = device_count * train.per_device_eval_batch_size
    counted = collections.Counter(g.shape for g in buckets.EvalPlan(samples, shapes, rows))
    return tuple(counted[shape] for shape in range(len(shapes)))


def _guessed(cfg: config.Config, start: origins.Origin) -> Data:
    data, train = cfg.data, cfg.train
    shapes = even_shapes(data.max_seconds, data.num_buckets, start.model_config)
    symbols, reason = _symbols(cfg, start)
    eval_shapes = static_shapes.Shapes((), ())
    if data.eval_splits or data.test_splits:
        eval_shapes = even_shapes(
            data.max_seconds, static_shapes.scoring_buckets(data.num_buckets), start.model_config
        )
    seconds = float(np.mean(shapes.samples)) / audio.SAMPLE_RATE_HZ
    return Data(
        symbols=symbols,
        train_shapes=shapes,
        train_portions=(1 / len(shapes.samples),) * len(shapes.samples),
        eval_shapes=eval_shapes,
        scored_groups=None,
        audio_seconds=seconds * train.global_batch_size,
        updates=train.max_steps,
        guesses=(
            f"nothing is prepared; {len(shapes.samples)} shapes up to data.max_seconds"
            f" {data.max_seconds:g}, evenly, all equally frequent and full",
            f"{LABELS_PER_SECOND} labels a second",
            f"{symbols} symbols ({reason})",
        ),
    )


def even_shapes(
    max_seconds: float, num_buckets: int, model_config: Wav2Vec2Config
) -> static_shapes.Shapes:
    """Evenly spaced padded lengths, multiples of 16 frames as in a real run."""
    longest = int(max_seconds * audio.SAMPLE_RATE_HZ)
    smallest = static_shapes.frame_samples(model_config)
    samples = set()
    for bucket in range(1, num_buckets + 1):
        wanted = longest * bucket // num_buckets
        frames = int(wav2vec2.frame_lengths(model_config, wanted))
        whole = -(-max(frames, 1) // buckets.FRAME_MULTIPLE) * buckets.FRAME_MULTIPLE
        samples.add(smallest(whole))
    return labelled(tuple(sorted(samples)))


def labelled(samples: tuple[int, ...]) -> static_shapes.Shapes:
    """These padded lengths with as many labels as `LABELS_PER_SECOND` says."""
    multiple = loader.LABEL_MULTIPLE
    per_label = audio.SAMPLE_RATE_HZ * multiple
    return static_shapes.Shapes(
        samples, tuple(-(-LABELS_PER_SECOND * n // per_label) * multiple for n in samples)
    )


def _symbols(cfg: config.Config, start: origins.Origin) -> tuple[int, str]:
    if cfg.text.vocabulary is not None:
        return origins.symbols(cfg.text.vocabulary).size, "text.vocabulary"
    if "vocab_size" in cfg.model.config:
        return cfg.model.config["vocab_size"], "model.config.vocab_size"
    if start.vocabulary is not None:
        return start.vocabulary.size, "the pretrained head's"
    language = cfg.data.language
    if language is not None and languages.writes_without_spaces(language):
        return SYMBOLS_UNSPACED, f"as {language} is written without spaces"
    return SYMBOLS, "an alphabet"
