"""train(config): the story of a run."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import flax_asr
from flax_asr import (
    card,
    checkpoint,
    config,
    curves,
    errors,
    evaluate,
    experiment,
    export,
    optim,
    parallel,
    progress,
    run_folder,
    runlog,
    step,
    stopping,
    window,
)
from flax_asr.data import buckets, loader

logger = logging.getLogger(__name__)


def train(asked: config.Config, *, restart: bool = False) -> None:
    """Prepares, trains, evaluates, saves, exports and writes the card; goes on where it stopped.

    Args:
        asked: the configuration as the user gave it.
        restart: put what is in output_dir aside and begin again.

    Raises:
        FlaxAsrError: something that the user can mend.
        Interrupted: SIGTERM or SIGINT came; everything is saved.
    """
    asked.require("output_dir", "data.source", "data.language")
    devices = parallel.Devices()
    cfg = run_folder.resolve(asked, devices.count)
    folder = Path(cfg.output_dir)
    with run_folder.owned(folder), stopping.Stop() as stop:
        past = run_folder.resume_point(folder, cfg, restart)
        run = Run(cfg, folder, devices, past)
        if past is not None and run_folder.is_finished(folder, run.updates, run.has("test")):
            logger.info("%s is finished: %d updates. Nothing to do.", folder, run.updates)
            return
        config.save(cfg, folder / run_folder.CONFIG)
        for warning in run.warnings():
            logger.warning("warning: %s", warning)
        run.compile()
        run.begin()
        run.train(stop)
        run.finish()


class Run:
    """One run in its folder: what it is made of, and its three acts."""

    def __init__(
        self,
        cfg: config.Config,
        folder: Path,
        devices: parallel.Devices,
        past: checkpoint.Meta | None,
    ):
        self.cfg, self.folder, self.devices, self.past = cfg, folder, devices, past
        start = experiment.origin(cfg.model)
        self.corpus = experiment.corpus(cfg, start)
        if past is None:
            start, self.params = experiment.initial_model(cfg, start, self.corpus)
        else:
            start, self.params = experiment.resumed_origin(past), None
        self.start = start
        self.objective = experiment.objective(cfg, start)
        train_config = cfg.train
        self.group_rows = (
            past.group_rows
            if past is not None
            else devices.count * train_config.per_device_train_batch_size
        )
        self.train_shapes = experiment.shapes(cfg, start.model_config, [self.corpus.train])
        scored = list(self.corpus.scored().values())
        self.eval_shapes = (
            experiment.shapes(cfg, start.model_config, scored)
            if scored
            else experiment.Shapes((), ())
        )
        self.plan = buckets.TrainPlan(
            self.corpus.train.samples,
            self.train_shapes.samples,
            self.group_rows,
            train_config.global_batch_size // self.group_rows,
            cfg.seed,
        )
        self.updates = experiment.total_updates(train_config, self.plan.updates_per_epoch)
        self.learning_rate = optim.schedule(cfg.optim, self.updates)
        self.optimiser = optim.adamw(cfg.optim, self.learning_rate)

    def has(self, which: str) -> bool:
        """Whether there are `eval` or `test` examples."""
        return which in self.corpus.scored()

    def warnings(self) -> Iterator[str]:
        """What is allowed and probably not meant."""
        cfg = self.cfg
        if cfg.optim.warmup_steps > self.updates / 5:
            yield (
                f"the warm-up takes {cfg.optim.warmup_steps} of {self.updates} updates, more than a"
                " fifth of the run; lower optim.warmup_steps."
            )
        if cfg.train.mixed_precision == "fp16" and self.devices.platform == "tpu":
            yield "TPUs compute in bf16: train.mixed_precision fp16 only adds a loss scale."
        if self.start.facts["head"].startswith("fresh") and cfg.optim.warmup_steps == 0:
            yield "a fresh head without warm-up can ruin the encoder; set optim.warmup_steps."

    def compile(self) -> None:
        """Compiles every step in every shape, largest first; nothing is compiled later."""
        train, devices = self.cfg.train, self.devices
        nested = experiment.parameter_shapes(self.objective) if self.params is None else self.params
        self.state_shapes = devices.replicated_shapes(
            jax.eval_shape(lambda: experiment.fresh_state(self.cfg, nested, self.optimiser))
            if self.params is None
            else jax.eval_shape(
                lambda p: experiment.fresh_state(self.cfg, p, self.optimiser), nested
            )
        )
        state = self.state_shapes
        params = {**state.trainable, **state.frozen}
        sums = devices.sum_shapes(state.trainable)
        accumulate = parallel.accumulate(self.objective, devices)
        evaluates = parallel.evaluate(self.objective, devices)
        jobs: dict[Any, tuple] = {}
        for samples, tokens in reversed(list(self.train_shapes)):
            batch = devices.batch_shapes(train.per_device_train_batch_size, samples, tokens)
            jobs["accumulate", samples] = (accumulate, (state, sums, batch))
        jobs["update"] = (
            parallel.update(self.optimiser, self.learning_rate, devices),
            (state, sums),
        )
        for samples, tokens in reversed(list(self.eval_shapes)):
            batch = devices.batch_shapes(train.per_device_eval_batch_size, samples, tokens)
            jobs["evaluate", samples] = (evaluates, (params, batch))
        parallel.keep_compiled(self.folder / "compilation_cache")
        logger.info(
            "%d updates of %d clips; %d programs to compile, the largest first",
            self.updates,
            train.global_batch_size,
            len(jobs),
        )
        with progress.Progress(len(jobs), "compiling", "programs") as bar:
            self.programs = parallel.compile_all(jobs, lambda key, seconds: bar.advance(1))
        self.compilations = parallel.Compilations()

    def begin(self) -> None:
        """The state before the next update, from the checkpoint or fresh."""
        train = self.cfg.train
        self.checkpoints = checkpoint.Checkpoints(
            self.folder, train.save_total_limit, train.metric_for_best_model
        )
        if self.past is None:
            fresh = experiment.fresh_state(self.cfg, self.params, self.optimiser)
            self.state = self.devices.replicate(jax.device_get(fresh))
        else:
            self.state = self.checkpoints.restore(self.past.step, self.state_shapes)
            logger.info("going on after update %d", self.past.step)
        self.params = None
        self.step = 0 if self.past is None else self.past.step
        self.log = runlog.RunLog(self.folder, keep_until=self.step)
        self.window = window.Window(self.past.window if self.past else {})
        self.saved_step = self.step if self.past else None

    def train(self, stop: stopping.Stop) -> None:
        """Updates until the end or until asked to stop."""
        cfg = self.cfg.train
        sums = self.devices.zero_sums(self.state.trainable)
        batches = loader.updates(
            self.corpus.train,
            self.plan,
            self.step,
            self.devices.host_index,
            self.devices.host_count,
        )
        pending = None
        with (
            batches,
            progress.Progress(self.updates, "training", "updates", initial=self.step) as bar,
        ):
            for number, groups in batches:
                if number >= self.updates:
                    break
                for batch, _ in groups:
                    program = self.programs["accumulate", batch.audio.shape[1]]
                    for micro in self.devices.micro_batches(batch, cfg.per_device_train_batch_size):
                        sums = program(self.state, sums, micro)
                self.state, sums, metrics = self.programs["update"](self.state, sums)
                # the figures of the update before this one: reading them never stalls the device
                self._count(pending, bar)
                pending = (metrics, groups)
                self.step = number + 1
                if self._due(cfg.logging_steps, cfg.eval_steps, cfg.save_steps) or stop.asked:
                    self._count(pending, bar)
                    pending = None
                    self._boundary(batches, stop)

    def _due(self, *intervals: int) -> bool:
        return self.step == self.updates or any(self.step % n == 0 for n in intervals)

    def _count(self, pending, bar: progress.Progress) -> None:
        if pending is None:
            return
        metrics, groups = pending
        metrics = jax.device_get(metrics)
        if metrics.bad_in_a_row >= self.cfg.train.max_bad_updates:
            ids = [self.corpus.train.ids[r] for _, g in groups for r in g.rows if r >= 0]
            raise errors.TrainingError(
                f"{int(metrics.bad_in_a_row)} updates in a row had a gradient that is not finite;"
                f" the last at step {self.step} with the clips {', '.join(ids[:8])}. Try a lower"
                " optim.learning_rate, or train.mixed_precision bf16 or fp32."
            )
        self.window.add(metrics, groups, self.corpus.train, self.plan.shapes)
        bar.advance(1, **self.window.facts())

    def _boundary(self, batches: loader.Prefetched, stop: stopping.Stop) -> None:
        """Logs, scores and saves what is due after this update."""
        cfg = self.cfg.train
        epoch = round(self.step / self.plan.updates_per_epoch, 2)
        if self._due(cfg.logging_steps):
            event = {"step": self.step, "epoch": epoch}
            event |= self.window.close(batches.wait_seconds)
            self.log.append(event | {"compilations": self.compilations.count})
        metrics: dict[str, float] = {}
        if self.has("eval") and self._due(cfg.eval_steps):
            with self.window.paused():
                metrics = self.score("eval")
                self.log.append({"step": self.step, "epoch": epoch, **metrics})
        best = f"eval_{cfg.metric_for_best_model}"
        improved = best in metrics and metrics[best] < self._best_score()
        if improved or self._due(cfg.save_steps) or stop.asked:
            with self.window.paused():
                self.checkpoints.save(self.state, self._meta(metrics))
        if stop.asked and self.step < self.updates:
            self.checkpoints.wait()
            raise errors.Interrupted(
                f"stopped after update {self.step}; everything is saved in {self.folder}."
                " Run the same command to go on."
            )

    def _best_score(self) -> float:
        name = f"eval_{self.cfg.train.metric_for_best_model}"
        earlier = [e[name] for e in runlog.read(self.folder) if name in e and e["step"] < self.step]
        return min(earlier, default=float("inf"))

    def score(self, which: str) -> dict[str, float]:
        """`eval` or `test` figures of the present parameters."""
        data = self.corpus.scored()[which]
        rows = self.devices.count * self.cfg.train.per_device_eval_batch_size
        scores = evaluate.score(
            parallel.forward(
                self.programs,
                {**self.state.trainable, **self.state.frozen},
                self.devices,
                self.cfg.train.per_device_eval_batch_size,
            ),
            data,
            buckets.EvalPlan(data.samples, self.eval_shapes.samples, rows),
            self.corpus.vocabulary,
            tokens=self.eval_shapes.tokens,
            language=self.cfg.data.language,
            predictions=self.folder / f"predictions-{which}.jsonl",
            seed=self.cfg.seed,
        )
        logger.info("step %d: %s", self.step, scores.describe(which))
        return scores.as_metrics(which)

    def _meta(self, metrics: dict[str, float]) -> checkpoint.Meta:
        return checkpoint.Meta(
            step=self.step,
            run=config.as_dict(self.cfg),
            model_config=self.start.model_config.to_dict(),
            vocabulary=self.corpus.vocabulary.to_json(),
            normalization=self.corpus.normalizer.spec,
            do_normalize=self.start.do_normalize,
            use_attention_mask=self.start.use_attention_mask,
            group_rows=self.group_rows,
            facts={**self.start.facts, **self.data_facts()},
            metrics=metrics,
            window=self.window.as_json(),
        )

    def data_facts(self) -> dict[str, Any]:
        """Release, hash and size of what is trained on and scored, for the card."""
        sets = {"train": self.corpus.train, **self.corpus.scored()}
        return {
            "flax_asr": flax_asr.__version__,
            "splits": {
                name: {
                    "release": data.release,
                    "hash": data.hash,
                    "clips": len(data),
                    "seconds": round(data.seconds, 2),
                }
                for name, data in sets.items()
            },
        }

    def finish(self) -> None:
        """The best checkpoint: its test scores, the export, the curves and the card."""
        self.checkpoints.close()
        best = checkpoint.best_step(self.folder)
        saved = checkpoint.load_model(self.folder, best)
        flat, _ = step.split(saved.params, lambda path: True)
        self.state = self.state.replace(
            trainable=self.devices.replicate({path: flat[path] for path in self.state.trainable}),
            frozen=self.devices.replicate({path: flat[path] for path in self.state.frozen}),
        )
        if self.has("test"):
            event = {"step": self.step, "best_step": best, **self.score("test")}
            self.log.append(event)
        export.write_folder(self.folder / "export", saved, self.cfg, saved.meta.facts)
        curves.draw(self.folder)
        card.write(self.folder, saved)
        self.log.close()
