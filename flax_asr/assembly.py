"""Everything that a run needs before its first update: data, model, batch plan, compiled steps."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jaxtyping import PyTree

import flax_asr
from flax_asr import (
    batch_size,
    checkpoint,
    compat,
    compilation,
    config,
    corpora,
    differences,
    experiment,
    feature_cache,
    initial_weights,
    inventory,
    origins,
    parallel,
    programs,
    static_shapes,
    step,
)
from flax_asr.data import features, loader
from flax_asr.diagnosis import findings
from flax_asr.estimate import forecast
from flax_asr.hosts import multihost
from flax_asr.models import wav2vec2

logger = logging.getLogger(__name__)

Programs = dict[tuple, Callable]
"""Compiled programs, by the keys of `programs.jobs` and of `parallel.gather_jobs`."""


class Assembly:
    """The parts of a run; all follow from the configuration and, on a resume, the checkpoint.

    Args:
        cfg: the configuration, with its global batch size resolved.
        devices: the devices to run on.
        past: the checkpoint that the run resumes from, if any.

    Attributes:
        start: where the weights come from, with the final configuration of the model.
        corpus: the examples, and the vocabulary that they share.
        objective: the model and its loss.
        train_shapes, eval_shapes: static shapes of training and of scoring.
        plan: which clips are trained on together, and when.
        augmentation: the augmentation of training clips, or None.
        group_rows: rows of a batch group, over all devices.
        updates: number of updates of the run.
        expected: the losses to expect.
        semantics: the behaviour that `train.compat` selects.
        layout: which arrays of the state are divided among the devices.

    Raises:
        FlaxAsrError: data, model or devices do not fit the configuration or the checkpoint.
    """

    def __init__(self, cfg: config.Config, devices: parallel.Devices, past: inventory.Meta | None):
        self.cfg, self.devices, self.past = cfg, devices, past
        self.group_rows = batch_size.group_rows(cfg, devices.count, past)
        start = origins.read(cfg.model) if past is None else origins.resumed(past)
        feature_cache.check(cfg, start, devices.host_count)
        self.corpus = corpora.prepared(cfg, start)
        if past is None:
            start, self._params = initial_weights.load(cfg, start, self.corpus)
        else:
            differences.check_data(past, self._splits())
            inventory.check_vocabulary(past, self.corpus.vocabulary)
            self._params = None
        self.start = start
        self.objective = experiment.objective(cfg, start)
        scored = list(self.corpus.scored().values())
        self.train_shapes = static_shapes.training(cfg, start.model_config, self.corpus.train)
        self.augmentation = experiment.augmentation(
            cfg, start.model_config, self.corpus.train, self.train_shapes
        )
        self.eval_shapes = static_shapes.scoring(cfg, start.model_config, scored)
        self.semantics = compat.of(cfg)
        self.plan = experiment.train_plan(
            cfg,
            self.corpus.train.samples,
            self.train_shapes.samples,
            self.group_rows,
            self.augmentation,
        )
        self.updates = experiment.total_updates(cfg.train, self.plan.updates_per_epoch)
        self.expected = forecast.losses(
            self.corpus.train, start.model_config, self.corpus.vocabulary.size
        )
        self._rule = experiment.rule(cfg, self.updates)
        params = self._params
        if params is None:
            params = experiment.parameter_shapes(self.objective)
        self._shapes = jax.eval_shape(self._fresh_state, params)
        self.layout = experiment.layout(cfg, self._shapes, devices.count)

    def digests(self) -> dict[str, str]:
        """Hashes of what hosts that train together must have in common when they start."""
        found = {
            f"clips of {name}": f"{split['clips']} of {split['release']} ({split['hash'][:12]})"
            for name, split in self._splits().items()
        }
        found["vocabulary"] = multihost.digest(self.corpus.vocabulary.to_json())
        found["model configuration"] = multihost.digest(self.start.model_config.to_json_string())
        found["weights"] = multihost.digest(self._params)
        return found

    def scores(self, which: str) -> bool:
        """Whether there are `eval` or `test` examples."""
        return which in self.corpus.scored()

    @property
    def fresh_head(self) -> bool:
        """Whether the run started with a fresh head."""
        return self.start.facts["head"].startswith("fresh")

    def train_function(self, update: int) -> str:
        """`programs.train_function` for this run."""
        return programs.train_function(self.cfg, self.devices.count, update)

    def weights_scored(self) -> dict[str, str]:
        """An entry for the log if the scored weights are not simply the last ones."""
        return {} if self.cfg.optim.ema_decay is None else {"weights": "average"}

    def warnings(self) -> Iterator[str]:
        """Warnings about settings that are allowed but probably not meant."""
        cfg, model_config = self.cfg, self.start.model_config
        group_norm = model_config.feat_extract_norm == "group"
        longest = self.corpus.train.samples.max()
        for finding in (
            *findings.without_effect(
                cfg, model_config, int(wav2vec2.frame_lengths(model_config, longest))
            ),
            # `doctor` warns of padding that only costs time.
            *(findings.batches(cfg, self.plan.padding, group_norm) if group_norm else ()),
            *findings.schedule(cfg, self.updates, self.fresh_head),
            *findings.precision(cfg.train.mixed_precision, self.devices.platform),
            *findings.language_rule(cfg, self.corpus.normalizer.is_default),
        ):
            yield finding.message
        if cfg.train.zero_sharding and not self.layout.axes:
            yield (
                f"train.zero_sharding changes nothing: no matrix of the model can be cut over"
                f" {self.devices.count} device{'s' if self.devices.count > 1 else ''}."
            )
        yield from self.corpus.warnings()

    def state_shapes(self) -> step.TrainState:
        """Shapes and shardings of the state."""
        return self.devices.placed_shapes(self._shapes, self.layout.state)

    def initial_state(self) -> step.TrainState:
        """The state before the first update; call this once, as its arrays are large."""
        fresh = self._fresh_state(self._params)
        self._params = None
        return self.devices.place(jax.device_get(fresh), self.layout.state)

    def _fresh_state(self, params: PyTree) -> step.TrainState:
        return experiment.fresh_state(
            self.cfg, self.start.model_config, params, self._rule.optimiser
        )

    def with_weights(self, state: step.TrainState, params: PyTree) -> step.TrainState:
        """The state with other weights, given as a nested tree on the host."""
        flat = step.flat(params)
        average = {path: flat[path] for path in state.average}
        return state.replace(
            trainable=self.devices.replicate({path: flat[path] for path in state.trainable}),
            frozen=self.devices.replicate({path: flat[path] for path in state.frozen}),
            average=self.devices.place(average, self.layout.state.average),
        )

    def cached_features(self, state: step.TrainState) -> features.Features | None:
        """The frozen layers' output for the training clips; None if training starts from audio."""
        if not self.cfg.data.cache_features:
            return None
        frozen = feature_cache.FrozenLayers(
            self.objective,
            {**state.trainable, **state.frozen},
            self.devices,
            self.train_shapes,
            self.cfg.train.per_device_train_batch_size,
        )
        return feature_cache.opened(self.cfg, self.corpus.train, frozen)

    def batches(
        self, begin: int, cached: features.Features | None
    ) -> loader.Prefetched[tuple[int, list[loader.Planned]]]:
        """This host's batches from update `begin` on, of `cached` features if they are given."""
        return loader.updates(
            self.corpus.train,
            self.plan,
            begin,
            self.devices.host_index,
            self.devices.host_count,
            tokens=self.train_shapes.tokens,
            augmentation=self.augmentation,
            kept=cached,
        )

    def compile(self) -> Programs:
        """Compiles every step in every shape, largest first; nothing is compiled later."""
        begin = 0 if self.past is None else self.past.step
        jobs = programs.jobs(
            programs.Steps(
                self.cfg,
                self.objective,
                self._rule,
                self.layout,
                self._shapes,
                self.train_shapes,
                self.eval_shapes,
            ),
            self.devices,
            (begin, self.updates - 1),
        ) | parallel.gather_jobs(self.state_shapes(), self.devices)
        logger.info(
            "%d updates of %d clips, %d an epoch; %d programs to compile, the largest first",
            self.updates,
            self.cfg.train.global_batch_size,
            self.plan.updates_per_epoch,
            len(jobs),
        )
        return compilation.compile_shown(jobs)

    def meta(self, **progress: Any) -> inventory.Meta:
        """The metadata of a checkpoint.

        Args:
            **progress: `step`, `metrics`, `window` and `log_events`, which differ by checkpoint.
        """
        return inventory.Meta(
            **progress,
            run=config.as_dict(self.cfg),
            model_config=self.start.model_config.to_dict(),
            vocabulary=self.corpus.vocabulary.to_json(),
            normalization=self.corpus.normalizer.spec,
            do_normalize=self.start.do_normalize,
            use_attention_mask=self.start.use_attention_mask,
            group_rows=self.group_rows,
            facts={
                **self.start.facts,
                "flax_asr": flax_asr.__version__,
                "updates": self.updates,
                "extensions": self._extensions(),
                "splits": self._splits(),
            },
        )

    def described(self, saved: checkpoint.SavedModel) -> checkpoint.SavedModel:
        """A checkpoint with current facts: it may be older than the last extension of the run."""
        facts = saved.meta.facts | {"updates": self.updates, "extensions": self._extensions()}
        meta = dataclasses.replace(saved.meta, run=config.as_dict(self.cfg), facts=facts)
        return dataclasses.replace(saved, meta=meta)

    def _extensions(self) -> list[dict[str, int]]:
        """Extensions of the run: after which update, and how many updates were planned before."""
        if self.past is None:
            return []
        facts = self.past.facts
        before = facts.get("extensions", [])
        if facts["updates"] == self.updates:
            return before
        return [*before, {"after": self.past.step, "planned": facts["updates"]}]

    def _splits(self) -> dict[str, dict[str, Any]]:
        """Release, hash and size of what is trained on and scored."""
        return {
            name: {
                "release": data.release,
                "hash": data.hash,
                "clips": len(data),
                "seconds": round(data.seconds, 2),
            }
            for name, data in self.corpus.sets().items()
        }
