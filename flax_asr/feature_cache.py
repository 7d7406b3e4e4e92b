"""The frozen layers' output for every training clip: computed once, then read in every epoch.

With `model.trainable_layers` the layers below do not change. If nothing in them is random either,
their output for a clip is the same in every epoch. `data.features` stores it.
"""

import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Shaped

from flax_asr import (
    compilation,
    config,
    criterion,
    errors,
    optim,
    origins,
    parallel,
    static_shapes,
    step,
)
from flax_asr.console import progress
from flax_asr.data import buckets, examples, features, loader, prepared_dir
from flax_asr.hosts import multihost
from flax_asr.models import wav2vec2

logger = logging.getLogger(__name__)

FORMAT = 1
_RANDOM = "feat_proj_dropout hidden_dropout attention_dropout activation_dropout layerdrop".split()
_MASKS = ["mask_time_prob", "mask_feature_prob"]


def check(cfg: config.Config, start: origins.Origin, host_count: int = 1) -> None:
    """Refuses `data.cache_features` if training from cached features would give other results.

    Raises:
        ConfigError: it would; says why.
    """
    if not cfg.data.cache_features:
        return

    def refuse(why: str) -> None:
        raise errors.ConfigError(f"data.cache_features {why}")

    model = start.model_config
    if cfg.model.trainable_layers is None:
        refuse(
            "keeps the frozen layers' output, and none are frozen: set model.trainable_layers"
            " (to keep the feature encoder's output alone would not pay)."
        )
    if cfg.data.augment != config.AugmentConfig():
        refuse("keeps one form of every clip: it cannot be used with data.augment.")
    if host_count > 1:
        refuse(f"works on one host, not on {host_count}.")
    if model.feat_extract_norm != "layer":
        refuse(
            "needs an encoder whose convolutions have layer norm, such as XLS-R's: in this one a"
            " clip's features depend on its padding."
        )
    if not start.use_attention_mask:
        refuse(
            "needs a model that is told where clips end; preprocessor_config.json says"
            " return_attention_mask false."
        )
    varying = [*_RANDOM, *(_MASKS if model.apply_spec_augment else [])]
    found = {name: getattr(model, name) for name in varying if getattr(model, name) > 0}
    if found:
        listed = ", ".join(f"{name} {value:g}" for name, value in found.items())
        options = " ".join(f"--model.config.{name} 0" for name in found)
        refuse(
            f"keeps the frozen layers' output, which changes in every epoch with {listed}."
            f" Without them: {options}"
        )


@dataclass(frozen=True)
class FrozenLayers:
    """The layers that a run does not train, and the devices that compute them.

    Attributes:
        objective: the run's model, whose lowest `objective.lower_layers` layers are frozen.
        params: all its parameters, on the devices.
        devices: the devices of the run.
        shapes: the static shapes of its batches.
        per_device: number of clips that a device computes at once.
    """

    objective: criterion.Objective
    params: step.Parameters
    devices: parallel.Devices
    shapes: static_shapes.Shapes
    per_device: int

    def compiled(self) -> dict[int, Callable]:
        """The compiled forward pass through these layers, by number of padded samples."""
        lower = parallel.lower(self.objective, self.devices)
        jobs = {
            samples: (
                lower,
                (self.params, self.devices.batch_shapes(self.per_device, samples, tokens)),
            )
            for samples, tokens in reversed(list(self.shapes))
        }
        return compilation.compile_shown(jobs, "compiling the frozen layers")

    def outputs(
        self,
        programs: Mapping[int, Callable],
        train: examples.Examples,
        rows: Int[np.ndarray, " rows"],
    ) -> Iterator[tuple[int, Shaped[np.ndarray, "frames hidden"]]]:
        """Yields each of these rows with its frames, including those of padding, in any order."""
        at_once = self.devices.local_count * self.per_device
        for group in buckets.EvalPlan(train.samples[rows], self.shapes.samples, at_once):
            samples, tokens = list(self.shapes)[group.shape]
            real = group.rows >= 0
            own = np.where(real, rows[group.rows], -1)
            batch = loader.assemble(train, own, samples, tokens)
            (placed,) = self.devices.micro_batches(batch, self.per_device)
            given = np.asarray(programs[samples](self.params, placed))
            by_row = given.reshape(-1, *given.shape[2:])
            for place in np.flatnonzero(real):
                yield int(own[place]), by_row[place]


def opened(cfg: config.Config, train: examples.Examples, frozen: FrozenLayers) -> features.Features:
    """The cached features of the training clips; missing ones are computed first.

    Args:
        cfg: the configuration of the run, which has passed `check`.
        train: the training clips.
        frozen: the layers that compute the features.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    objective, model = frozen.objective, frozen.objective.config
    about = _about(objective, train, frozen.params)
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    kept = features.Features(
        prepared_dir.folder(cfg) / f"{features.PREFIX}{name}",
        train.samples,
        functools.partial(wav2vec2.frame_lengths, model),
        model.hidden_size,
        objective.module.dtype,
    )
    with prepared_dir.alone_in(kept.folder):
        if not kept.is_finished():
            _compute(frozen, train, kept)
            kept.finish(about)
    # Not removed, as another run may use them.
    for folder, size in kept.others().items():
        logger.info(
            "%s holds %.2f GB of features of other settings: delete it if no run needs it",
            folder,
            size / 1e9,
        )
    kept.open()
    return kept


def _about(
    objective: criterion.Objective, train: examples.Examples, params: step.Parameters
) -> dict[str, str | int]:
    """Everything that the cached features depend on."""
    lower = {path: params[path] for path in sorted(params) if _is_below(objective, path)}
    return {
        "format": FORMAT,
        "part_bytes": features.PART_BYTES,
        "clips": train.hash,
        "weights": multihost.digest(lower),
        "lower_layers": objective.lower_layers,
        "model_config": multihost.digest(objective.config.to_json_string()),
        "do_normalize": objective.do_normalize,
        "dtype": np.dtype(objective.module.dtype).name,
    }


def _is_below(objective: criterion.Objective, path: str) -> bool:
    """Whether the cached features depend on this parameter."""
    only_upper = config.ModelConfig(
        trainable_layers=objective.config.num_hidden_layers - objective.lower_layers
    )
    return not optim.trainable(only_upper, objective.config)(path)


def _compute(frozen: FrozenLayers, train: examples.Examples, kept: features.Features) -> None:
    """Computes every part that is missing."""
    missing = list(kept.missing())
    logger.info(
        "keeping the output of %d layers for %d clips: %.2f GB in %s",
        frozen.objective.lower_layers,
        len(train),
        kept.bytes / 1e9,
        kept.folder,
    )
    kept.check_room()
    programs = frozen.compiled()
    started = time.monotonic()
    done = len(train) - sum(len(rows) for _, rows in missing)
    with progress.Progress(len(train), "keeping features", "clips", initial=done) as bar:
        for number, rows in missing:
            frames: dict[int, np.ndarray] = {}
            for row, padded in frozen.outputs(programs, train, rows):
                frames[row] = padded[: kept.length(row)]
                bar.advance()
            kept.write(number, [frames[row] for row in rows])
    logger.info("kept after %.1f minutes", (time.monotonic() - started) / 60)
