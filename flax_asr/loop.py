"""The training loop: `train(config)` does a whole run, from the data to the model card."""

import contextlib
import logging
from pathlib import Path

from flax_asr import (
    assembly,
    batch_size,
    checkpoint,
    compilation,
    config,
    differences,
    early_stopping,
    errors,
    inventory,
    kept_programs,
    parallel,
    run_folder,
    score_files,
)
from flax_asr.bucket import mirror, store
from flax_asr.console import progress
from flax_asr.data import prepare, prepared_dir, rereading
from flax_asr.hosts import cluster, multihost, stopping
from flax_asr.record import json_lines, left_out, runlog
from flax_asr.training import (
    accumulation,
    failed_saves,
    finishing,
    monitor,
    resume,
    run_scores,
)

logger = logging.getLogger(__name__)


def train(asked: config.Config, *, restart: bool = False) -> None:
    """Prepares, trains, evaluates, saves, exports and writes the card, or resumes where it stopped.

    Args:
        asked: the configuration as the user gave it.
        restart: move the old run in output_dir aside and start from the beginning.

    Raises:
        FlaxAsrError: something that the user can fix.
        Interrupted: a signal asked the process to stop; everything is saved.
    """
    asked.require("output_dir", "data.source", "data.language")
    cluster.join()
    devices = parallel.Devices()
    early_stopping.check(asked)
    cfg = batch_size.resolve(asked, devices.count)
    folder = store.local_folder(cfg.output_dir, kind="runs")
    with (
        multihost.Hosts() as hosts,
        hosts.first_only(run_folder.owned(folder)),
        stopping.Stop(hosts.leave) as stop,
        contextlib.closing(mirror.attached(cfg, folder, restart, hosts)) as mirrored,
    ):
        hosts.agree("configuration", differences.same_on_all_hosts(cfg))
        past = resume.point(hosts, folder, cfg, restart, mirrored)
        if past is not None and hosts.decided(lambda: run_folder.is_finished(folder, past, cfg)):
            mirrored.wait()
            logger.info("%s is finished: %d updates. Nothing to do.", cfg.output_dir, past.step)
            return
        hosts.work_ahead(
            prepared_dir.folder(cfg),
            lambda: prepare.prepare(cfg),
            for_all=prepared_dir.is_in_bucket(cfg),
        )
        made = assembly.Assembly(cfg, devices, past)
        hosts.agree("data or weights", made.digests() if hosts.count > 1 else {})
        if hosts.is_first:
            run_folder.sweep(folder)
            run_folder.record(folder, cfg)
            left_out.record(folder, made.corpus.sets())
        for warning in made.warnings():
            logger.warning("warning: %s", warning)
        with (
            contextlib.closing(_reread(made, hosts)) as audio,
            kept_programs.kept(folder / run_folder.COMPILED),
        ):
            programs = made.compile()
            with contextlib.closing(
                Run(made, programs, folder, stop, hosts, mirrored, audio)
            ) as run:
                hosts.wait()  # the first sum over hosts would wait too, but give up sooner
                with stop.deferred():
                    run.train()
                stop.obey()
                run.finish()
        mirrored.wait()


def _reread(made: assembly.Assembly, hosts: multihost.Hosts) -> rereading.Rereading:
    """Starts to verify the audio; the first host does it for all hosts that share its disk."""
    shared = hosts.count > 1 and hosts.share(prepared_dir.folder(made.cfg))
    return rereading.Rereading(made.corpus.splits() if hosts.is_first or not shared else [])


class Run:
    """One run in its folder.

    Attributes:
        step: number of updates done.
        state: the state after them.
    """

    def __init__(
        self,
        made: assembly.Assembly,
        programs: assembly.Programs,
        folder: Path,
        stop: stopping.Stop,
        hosts: multihost.Hosts,
        mirrored: mirror.Mirrored,
        audio: rereading.Rereading,
    ):
        self.made, self.programs, self.folder, self.hosts = made, programs, folder, hosts
        self.mirrored, self.audio = mirrored, audio
        self.stop = multihost.SharedStop(hosts, stop)
        self.cfg, past = made.cfg.train, made.past
        if past is None:
            self.step = 0
            self.state = made.initial_state()
        else:
            self.step = past.step
            if hosts.is_first:
                inventory.set_aside(folder, newer_than=past.step)
            self.state = checkpoint.restore(folder, past.step, made.state_shapes())
            logger.info("going on after update %d", past.step)
        if made.cfg.data.cache_features:
            audio.wait()  # features of damaged audio would be kept for other runs too
        self.cached_features = made.cached_features(self.state)
        writes, logged = hosts.is_first, 0 if past is None else past.log_events
        with contextlib.ExitStack() as opened:
            self.checkpoints = checkpoint.Checkpoints(folder, self.cfg.save_total_limit, writes)
            opened.callback(self.checkpoints.close)
            self.log = runlog.RunLog(folder, logged, self.step, writes)
            opened.callback(self.log.close)
            failed_before = self.log.last("failed_saves", 0)
            self.failed_saves = failed_saves.FailedSaves(self.cfg.on_save_error, failed_before)
            self.monitor = monitor.Monitor(made, self.log.events)
            if not self.log.events:
                self._log(self.monitor.watch.expectations())
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Closes the log and the checkpoints, after those that are being written."""
        self._opened.close()

    def train(self) -> None:
        """Trains to the end of the run; on return everything is saved.

        Raises:
            Interrupted: a signal asked the process to stop; everything is saved.
            TrainingError: too many updates in a row were not finite.
        """
        if self._misses_evaluation():
            self._score_and_save()
        if self.step < self.made.updates and not self.stop.asked and not self._stops_early():
            self._updates()
        self.checkpoints.wait()
        if self.stop.asked_by_any():
            self.mirrored.wait()
            raise errors.Interrupted(
                f"stopped after update {self.step}; everything is saved in"
                f" {self.made.cfg.output_dir}. Run the same command to go on."
            )
        if self.step < self.made.updates:
            patience = self.cfg.early_stopping_patience
            logger.info(
                "%d evaluations without a better score: stopped early after update %d of %d",
                patience,
                self.step,
                self.made.updates,
            )
            self._log({"stopped_early_after": patience})

    def finish(self) -> None:
        """Scores the best checkpoint on the test splits; writes export, curves and card."""
        self.audio.wait()
        saved = self.made.described(finishing.best(self.folder, self.hosts, self.mirrored))
        if self.made.scores("test"):
            self.state = self.made.with_weights(self.state, saved.params)
            scores = self._score("test") | self.made.weights_scored()
            self.log.append({"step": self.step, "best_step": saved.step, **scores})
        if self.hosts.is_first:
            finishing.write(self.folder, saved, self.made.cfg, self.step)

    def _updates(self) -> None:
        """Runs the updates; logs, scores and saves when it is due."""
        accumulated = accumulation.Accumulation(
            self.made, self.programs, self.step, self.state.trainable
        )
        previous = None
        with (
            compilation.Compilations() as compilations,
            self.made.batches(self.step, self.cached_features) as batches,
            progress.Progress(self.made.updates, "training", "updates", initial=self.step) as bar,
        ):
            for number, groups in batches:
                self.state, metrics = accumulated.update(number, self.state, groups)
                self.stop.passed()
                # Read only after the next update is dispatched, so that the device never waits.
                if previous is not None:
                    bar.advance(1, **self.monitor.count(self.step, *previous))
                previous = metrics, groups
                self.step = number + 1
                due = self._due(self.cfg.logging_steps, self.cfg.eval_steps, self.cfg.save_steps)
                if due or self.stop.asked:
                    bar.advance(1, **self.monitor.count(self.step, *previous))
                    previous = None
                    self.audio.check()
                    self._notice_failed_saves()
                    if self._due(self.cfg.logging_steps):
                        figures = self.monitor.line(self.step, batches.wait_seconds)
                        figures["compilations"] = compilations.count
                        figures["failed_saves"] = self.failed_saves.count
                        self._log(figures)
                    if self._score_and_save() or self.step == self.made.updates:
                        return

    def _score_and_save(self) -> bool:
        """Scores and saves if due after this update; the best checkpoint so far is always saved.

        Returns:
            Whether the run stops here; then this step is saved even if no save is due.
        """
        with self.monitor.window.paused():
            metrics, improved = self._evaluate() if self._evaluation_is_due() else ({}, False)
            # Read once: a signal may come at any moment, and a run that stops here must save here.
            stops = self.stop.asked or self._stops_early()
            if improved or self._due(self.cfg.save_steps) or stops:
                self._save(metrics, stops)
        return stops

    def _evaluate(self) -> tuple[dict[str, float | str], bool]:
        """Logs the `eval` scores of this step; returns them and whether they are the best so far.

        If the process is asked to stop, the evaluation is aborted and there are no scores; the next
        start repeats it.
        """
        best = f"eval_{self.cfg.metric_for_best_model}"
        metrics, improved = {}, False
        # Hosts score together, so none can continue alone after a failed write.
        must = self.hosts.count > 1
        tolerant = self.failed_saves.counted(self.step, must)
        with contextlib.suppress(run_scores.BrokenOff), tolerant:
            metrics = self._score("eval")
            improved = metrics[best] < self.log.best(best)
            self._log(metrics | self.made.weights_scored())
        return metrics, improved

    def _score(self, which: str) -> dict[str, float | str]:
        """`eval` or `test` scores of the current parameters; writes the predictions.

        Raises:
            BrokenOff: the process was asked to stop.
        """
        scores, predictions = run_scores.score(
            which, self.made, self.programs, self.state.scored, self.stop
        )
        logger.info("step %d: %s", self.step, scores.describe(which))
        if self.hosts.is_first:
            json_lines.write(self.folder / score_files.named(which), predictions)
        return scores.as_metrics(which)

    def _save(self, metrics: dict[str, float | str], stops: bool) -> None:
        """Saves a checkpoint of this step; if the run stops or ends here, a failure is an error.

        Args:
            metrics: the scores of this step, if it was scored.
            stops: whether the run stops here.
        """
        meta = self.made.meta(
            step=self.step,
            metrics=metrics,
            window=self.monitor.window.as_json(),
            log_events=len(self.log.events),
        )
        # No checkpoint before all audio is verified; but a run that stops has no time to wait.
        (self.audio.check if stops else self.audio.wait)()
        # A collective: every host takes part, whether or not its writes work.
        state = parallel.whole(self.programs, self.state, self.made.layout, self.made.devices)
        with self.failed_saves.counted(self.step):
            self.checkpoints.wait()
        must = stops or self.step == self.made.updates
        with self.failed_saves.counted(self.step, must):
            self.log.flush()
            self.checkpoints.save(state, meta)

    def _notice_failed_saves(self) -> None:
        """Counts failures in the background, of checkpoints and of copies to a bucket."""
        for place in (self.checkpoints, self.mirrored):
            with self.failed_saves.counted(self.step):
                place.check()

    def _log(self, figures: dict[str, float]) -> None:
        epoch = round(self.made.plan.epoch(self.step), 2)
        with self.failed_saves.counted(self.step):
            self.log.append({"step": self.step, "epoch": epoch, **figures})

    def _due(self, *intervals: int) -> bool:
        return self.step == self.made.updates or any(self.step % n == 0 for n in intervals)

    def _evaluation_is_due(self) -> bool:
        return self.made.scores("eval") and self._due(self.cfg.eval_steps)

    def _misses_evaluation(self) -> bool:
        """Whether the run stopped during the evaluation that is due at this step."""
        return self.step > 0 and self._evaluation_is_due() and not self.log.evaluated(self.step)

    def _stops_early(self) -> bool:
        return early_stopping.is_due(self.log.events, self.cfg)
