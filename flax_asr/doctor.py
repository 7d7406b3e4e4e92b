"""Looks at the user's data and machine before they pay for a run, in about a minute.

Nothing is written but the report. The parts are gathered one after the other; what one of them
cannot do is a finding, and the others go on without it.
"""

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from transformers import Wav2Vec2Config

from flax_asr import (
    audio,
    config,
    consultation,
    errors,
    experiment,
    findings,
    forecast,
    host,
    optim,
    results,
    run_folder,
    survey,
    terminal,
    trial,
    vocabulary,
    workload,
)
from flax_asr.data import buckets, pool
from flax_asr.models import wav2vec2

READ_SECONDS = 12.0
HEAR_SECONDS = 12.0
TRIAL_SECONDS = 25.0
CHEAP_LAYERS = 2
_MOST_REPORTED = 20_000


def command(cfg: config.Config, json_file: str | None) -> None:
    """Prints what was found; with `json_file` writes it as one object too.

    Raises:
        ConfigError: the run cannot work, or an option that is needed is not there.
    """
    cfg.require("output_dir", "data.source", "data.language")
    with results.writer(json_file) as write:
        found = Examination(cfg)
        found.examine()
        shown = consultation.report(found.facts, found.findings)
        terminal.show(shown, results.people(json_file))
        write(found.as_json())
    fatal = [finding for finding in found.findings if finding.fatal]
    if fatal:
        raise errors.ConfigError(
            f"this run cannot work, for {len(fatal)} reason{'s' * (len(fatal) > 1)} above."
        )


class Examination:
    """One look at one configuration.

    Attributes:
        facts: everything that was seen, for programs.
        findings: what is worth saying, the dearest first.
    """

    def __init__(self, cfg: config.Config):
        self.cfg = cfg
        self.facts: dict[str, Any] = {}
        self.findings: list[findings.Finding] = []

    def as_json(self) -> dict[str, Any]:
        """The object of `--json`."""
        listed = [dataclasses.asdict(found) for found in self.findings]
        works = not any(found.fatal for found in self.findings)
        return {"can_work": works, "findings": listed, **self.facts}

    def examine(self) -> None:
        """Gathers everything."""
        # The accelerator belongs to one process: to the one of the trial.
        jax.config.update("jax_platforms", "cpu")
        self.facts["machine"] = host.facts(self.cfg)
        start = self._origin()
        corpus, splits = None, {}
        with self._noting("data"):
            splits = survey.look(self.cfg, read_seconds=READ_SECONDS, hear_seconds=HEAR_SECONDS)
            self._splits(splits)
            corpus = self._corpus(start, splits)
        asked = None
        if corpus is not None:
            start = _sized(start, corpus.vocabulary)
            with self._noting("model"):
                wav2vec2.check(start.model_config)
                asked = self._shapes(start, corpus)
        devices, timed = self._trial(asked)
        if corpus is not None and asked is not None and devices is not None:
            with self._noting("batches"):
                self._run(start, corpus, splits, asked, devices, timed)
        self.findings = findings.ordered(self.findings)

    @contextlib.contextmanager
    def _noting(self, part: str) -> Iterator[None]:
        """What the user would have to mend before the run is a finding that stops it."""
        try:
            yield
        except errors.FlaxAsrError as error:
            self.findings.append(findings.Finding(part, 1.0, str(error), fatal=True))

    def _origin(self) -> experiment.Origin:
        with self._noting("model"):
            return workload.origin(self.cfg.model)
        # So that the data can be judged all the same; frames are those of every wav2vec 2.0 model.
        return experiment.Origin(Wav2Vec2Config(), None, None, True, True, {})

    def _splits(self, splits: dict[str, survey.Split]) -> None:
        data = self.cfg.data
        self.facts["splits"] = {
            name: {
                "clips": len(split),
                "complete": split.complete,
                "decoded": split.heard,
                "lengths_from": split.lengths_from,
                "speakers": len({who for who in split.speakers if who}),
                "left_out": dict(Counter(entry.reason for entry in split.left_out)),
            }
            for name, split in splits.items()
        }
        for name, split in splits.items():
            if not split.complete:
                self.findings += findings.incomplete(name, len(split))
            for entries, clips in split.left_out_of():
                self.findings += findings.left_out(entries, clips, name)
        scored = dict.fromkeys((*data.eval_splits, *data.test_splits))
        others = {name: splits[name] for name in scored if name not in data.train_splits}
        shared = survey.shared({name: splits[name] for name in data.train_splits}, others)
        self.facts["shared_with_train"] = shared
        if "validated" not in data.train_splits:  # there, what is scored is taken out
            self.findings += findings.leakage(
                shared,
                {name: len(split) for name, split in others.items()},
                {name: len(split.audio_keys) for name, split in others.items()},
            )

    def _corpus(
        self, start: experiment.Origin, splits: dict[str, survey.Split]
    ) -> experiment.Corpus:
        """As `experiment.corpus`, of the clips whose length is known."""
        for split in splits.values():
            survey.require_clips(split)
        corpus = experiment.gather(
            self.cfg,
            start,
            splits,
            heeded=survey.Split.heeded_sentences,
            usable=survey.Split.judged,
        )
        train = [splits[name] for name in self.cfg.data.train_splits]
        sentences = [sentence for split in train for sentence in split.heeded_sentences()]
        self._text(corpus, sentences, "".join(map(corpus.normalizer, sentences)))
        return corpus

    def _text(self, corpus: experiment.Corpus, sentences: list[str], written: str) -> None:
        step = max(1, len(sentences) // _MOST_REPORTED)
        changes = corpus.normalizer.report(sentences[::step])
        counts = Counter(written)
        self.facts["text"] = {
            "normalization": corpus.normalizer.spec,
            "sentences_reported": len(sentences[::step]),
            "changes": [dataclasses.asdict(c) | {"text": c.describe()} for c in changes],
            "vocabulary": corpus.vocabulary.size,
            "characters": dict(counts.most_common()),
        }
        total = max(1, sum(map(len, sentences[::step])))
        default = self.cfg.text.normalization is None and corpus.normalizer.is_default
        self.findings += findings.normalisation(changes, total, default, self.cfg.data.language)
        for name, data in {"train": corpus.train, **corpus.scored()}.items():
            rows = len(data) + len(data.left_out)
            self.findings += findings.left_out(data.left_out, rows, f"the {name} splits")
            said = Counter("".join(data.references))
            strange = corpus.vocabulary.lacks(data.references)
            self.findings += findings.unknown(name, strange, sum(said.values()))

    def _shapes(self, start: experiment.Origin, corpus: experiment.Corpus) -> trial.Asked:
        cfg = self.cfg
        train = corpus.train
        shapes = experiment.shapes(cfg, start.model_config, [train])
        counts = np.bincount(
            buckets.row_shapes(train.samples, shapes.samples), minlength=len(shapes.samples)
        )
        commonest = int(counts.argmax())
        seconds = train.samples / audio.SAMPLE_RATE_HZ
        edges = [*range(0, math.ceil(float(seconds.max())) + 1)]
        self.facts["durations"] = {
            "edges_seconds": edges,
            "clips": forecast.histogram(seconds, edges),
            "mean_seconds": float(seconds.mean()),
            "longest_seconds": float(seconds.max()),
        }
        lengths = train.label_lengths
        edges = [*range(0, int(lengths.max()) + 1, max(1, int(lengths.max()) // 16))]
        self.facts["label_lengths"] = {
            "edges": edges,
            "clips": forecast.histogram(lengths, edges),
            "mean": float(lengths.mean()),
        }
        self.facts["suspects"] = survey.suspects(train)
        expected = forecast.losses(train, start.model_config, corpus.vocabulary.size)
        kept = start.vocabulary == corpus.vocabulary and not cfg.model.reset_head
        self.facts["losses"] = dataclasses.asdict(expected) | {
            "reduction": start.model_config.ctc_loss_reduction,
            "fresh_head": not kept,
        }
        self.facts["shapes"] = [
            {"samples": samples, "tokens": tokens, "clips": int(count)}
            for (samples, tokens), count in zip(shapes, counts, strict=True)
        ]
        return trial.Asked(
            cfg=cfg,
            model_config=start.model_config.to_dict(),
            do_normalize=start.do_normalize,
            use_attention_mask=start.use_attention_mask,
            samples=shapes.samples[commonest],
            tokens=shapes.tokens[commonest],
            limit_seconds=TRIAL_SECONDS,
        )

    def _trial(
        self, asked: trial.Asked | None
    ) -> tuple[trial.Machine | None, trial.Timed | pool.Failure | None]:
        try:
            devices, timed = trial.run(asked, TRIAL_SECONDS)
        except errors.DataError as error:  # the process cannot start
            devices, timed = pool.Failure("failed", str(error)), None
        if isinstance(devices, pool.Failure):
            self.findings.append(
                findings.Finding(
                    "devices",
                    1.0,
                    f"the devices do not answer ({devices.reason}: {devices.detail}). Is another"
                    " process at work on them? Is jax installed for them?",
                    fatal=True,
                )
            )
            return None, None
        self.facts["machine"] |= {"devices": devices._asdict()}
        if isinstance(timed, pool.Failure) and timed.reason != "timeout":
            self.findings.append(
                findings.Finding(
                    "trial",
                    1.0,
                    f"an update on the commonest shape does not run ({timed.reason}:"
                    f" {ascii(timed.detail[:400])[1:-1]}). If memory is short, lower"
                    " train.per_device_train_batch_size or set train.gradient_checkpointing.",
                    fatal=True,
                )
            )
        return devices, timed

    def _run(
        self,
        start: experiment.Origin,
        corpus: experiment.Corpus,
        splits: dict[str, survey.Split],
        asked: trial.Asked,
        devices: trial.Machine,
        timed: trial.Timed | pool.Failure | None,
    ) -> None:
        cfg = run_folder.resolve(self.cfg, devices.count)
        rows = devices.count * cfg.train.per_device_train_batch_size
        shapes = [shape["samples"] for shape in self.facts["shapes"]]
        plan = experiment.train_plan(cfg, corpus.train, shapes, rows)
        train = [splits[name] for name in cfg.data.train_splits]
        usable = survey.usable(corpus.train, train, cfg.data.max_train_clips)
        updates_per_epoch = buckets.updates_per_epoch(
            usable, plan.group_rows, plan.groups_per_update, plan.leaks
        )
        updates = experiment.total_updates(cfg.train, updates_per_epoch)
        self.facts["batches"] = {
            "train_clips": usable,
            "train_hours": usable * self.facts["durations"]["mean_seconds"] / 3600,
            "global_batch_size": cfg.train.global_batch_size,
            "micro_batches_an_update": plan.groups_per_update,
            "padding": plan.padding,
            "updates_per_epoch": updates_per_epoch,
            "updates": updates,
            "epochs": updates / updates_per_epoch,
        }
        fresh = self.facts["losses"]["fresh_head"]
        self.findings += findings.batches(
            cfg, plan.padding, start.model_config.feat_extract_norm == "group"
        )
        self.findings += findings.schedule(cfg, updates, fresh)
        self.findings += findings.precision(cfg.train.mixed_precision, devices.platform)
        self._time(cfg, start, corpus, splits, asked, devices, timed)
        self._room(cfg, start, splits, devices, timed)

    def _time(self, cfg, start, corpus, splits, asked, devices, timed) -> None:
        batches = self.facts["batches"]
        scored = 0.0
        if corpus.eval is not None:
            clips = survey.usable(
                corpus.eval, [splits[n] for n in cfg.data.eval_splits], cfg.data.max_eval_clips
            )
            scored = clips * float(corpus.eval.samples.mean())
        work = forecast.Work(
            model_config=start.model_config,
            model=cfg.model,
            trained_samples=batches["updates"]
            * cfg.train.global_batch_size
            * float(corpus.train.samples.mean())
            / (1 - batches["padding"]),
            scored_samples=scored
            * math.ceil(batches["updates"] / cfg.train.eval_steps)
            / (1 - batches["padding"]),
            updates=batches["updates"],
        )
        rows = devices.count * cfg.train.per_device_train_batch_size
        if isinstance(timed, trial.Timed):
            seconds = work.measured(
                asked.samples,
                rows * asked.samples / timed.accumulate_seconds,
                timed.update_seconds,
            )
        else:
            # A second device of a CPU is the same CPU.
            count = 1 if devices.platform == "cpu" else devices.count
            seconds = work.at_least(asked.samples, devices.flops_per_second * count)
        cheap = None
        layers = start.model_config.num_hidden_layers
        if cfg.model.trainable_layers is None and layers > CHEAP_LAYERS:
            cheap = seconds * work.share_with(CHEAP_LAYERS, asked.samples)
        self.facts["time"] = {
            "measured": isinstance(timed, trial.Timed),
            "update_on_samples": asked.samples,
            "whole_model": isinstance(timed, trial.Timed) and timed.layers == layers,
            "trial": timed._asdict() if timed is not None else None,
            "seconds": seconds,
            "days": seconds / 86400,
            "cheap_trainable_layers": CHEAP_LAYERS if cheap is not None else None,
            "cheap_days": cheap / 86400 if cheap is not None else None,
        }
        self.findings += findings.duration(
            seconds / 86400,
            (CHEAP_LAYERS, cheap / 86400) if cheap is not None else None,
            least=not isinstance(timed, trial.Timed),
        )

    def _room(self, cfg, start, splits, devices, timed) -> None:
        objective = experiment.objective(cfg, start)
        optimiser = optim.adamw(cfg.optim, optim.schedule(cfg.optim, 1))
        state = jax.eval_shape(
            lambda params: experiment.fresh_state(cfg, params, optimiser),
            experiment.parameter_shapes(objective),
        )
        weights = _bytes((state.trainable, state.frozen))
        checkpoint, gradients = _bytes(state), _bytes(state.trainable)
        kept = checkpoint * (cfg.train.save_total_limit + 1)
        prepared = 0
        if not survey.is_prepared(cfg):
            prepared = sum(
                round(split.seconds * audio.SAMPLE_RATE_HZ * 2) for split in splits.values()
            )
        temporary = timed.temporary_bytes if isinstance(timed, trial.Timed) else 0
        per_device = checkpoint + gradients + temporary
        self.facts["room"] = {
            "parameters": weights // 4,
            "trained_parameters": gradients // 4,
            "checkpoint_bytes": checkpoint,
            "checkpoints_bytes": kept,
            "export_bytes": weights,
            "prepared_bytes": prepared,
            "device_bytes": per_device,
        }
        disk, memory = self.facts["machine"]["disk"], self.facts["machine"]["memory_bytes"]
        need = {"output_dir": kept + weights, "prepared": prepared}
        if disk["output_dir"]["device"] == disk["prepared"]["device"]:
            need = {"output_dir": kept + weights + prepared}
        for name, count in need.items():
            free = disk[name]["free_bytes"]
            self.findings += findings.room(count, free, f"disk of {disk[name]['path']}", True)
        if devices.memory_bytes is not None:
            self.findings += findings.room(
                per_device, devices.memory_bytes, "memory of a device", True
            )
        elif devices.platform == "cpu":
            self.findings += findings.room(per_device, memory, "memory of this machine", True)


def _sized(start: experiment.Origin, found: vocabulary.Vocabulary) -> experiment.Origin:
    sizes = {"vocab_size": found.size, "pad_token_id": found.blank}
    return dataclasses.replace(
        start, model_config=Wav2Vec2Config(**(start.model_config.to_dict() | sizes))
    )


def _bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
