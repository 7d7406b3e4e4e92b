"""`flax-asr doctor`: checks the user's data and machine before a run, in about a minute.

Writes nothing but the report. If one part of the examination fails, that is a finding, and the
others continue without it.
"""

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import Wav2Vec2Config

from flax_asr import (
    audio,
    config,
    corpora,
    errors,
    feature_cache,
    initial_weights,
    origins,
    static_shapes,
)
from flax_asr.console import results, terminal
from flax_asr.data import buckets, examples, pool
from flax_asr.diagnosis import (
    consultation,
    findings,
    host,
    prognosis,
    spectrograms,
    survey,
    suspects,
    trial,
)
from flax_asr.estimate import forecast, workload
from flax_asr.models import wav2vec2

READ_SECONDS = 12.0
HEAR_SECONDS = 12.0
TRIAL_SECONDS = 25.0
_MOST_REPORTED = 20_000


def command(cfg: config.Config, json_file: str | None, pictures: str | None = None) -> None:
    """Prints the report; with `json_file` also writes it as one JSON object.

    Args:
        cfg: the configuration of the run.
        json_file: a file, or "-" for standard output.
        pictures: a folder for spectrograms of the most suspect training clips.

    Raises:
        ConfigError: the run cannot work, or a required option is missing.
    """
    cfg.require("output_dir", "data.source", "data.language")
    if pictures is not None:
        spectrograms.draw(Path(pictures), [])  # fails now, not at the end, if it cannot be written
    with results.writer(json_file) as write:
        found = Examination(cfg, pictures)
        found.examine()
        shown = consultation.report(found.facts, found.findings)
        terminal.show(shown, results.people(json_file))
        write(found.as_json())
    fatal = [finding for finding in found.findings if finding.fatal]
    if fatal:
        raise errors.ConfigError(
            f"this run cannot work, for the {len(fatal)} reason{'s' * (len(fatal) > 1)} above."
        )


class Examination:
    """The examination of one configuration.

    Attributes:
        facts: everything that was found out, for programs.
        findings: problems, fatal ones first, then by cost.
    """

    def __init__(self, cfg: config.Config, pictures: str | None = None):
        self.cfg = cfg
        self.pictures = pictures
        self.facts: dict[str, Any] = {}
        self.findings: list[findings.Finding] = []

    def as_json(self) -> dict[str, Any]:
        """The object of `--json`."""
        listed = [dataclasses.asdict(found) for found in self.findings]
        works = not any(found.fatal for found in self.findings)
        return {"can_work": works, "findings": listed, **self.facts}

    def examine(self) -> None:
        """Fills `facts` and `findings`."""
        # The accelerator belongs to one process: that of the trial.
        jax.config.update("jax_platforms", "cpu")
        self.facts["machine"] = host.facts(self.cfg)
        start = self._origin()
        with self._noting("features"):
            feature_cache.check(self.cfg, start)
        corpus, splits = None, {}
        with self._noting("data"):
            splits = survey.look(self.cfg, read_seconds=READ_SECONDS, hear_seconds=HEAR_SECONDS)
            self._splits(splits)
            corpus = self._corpus(start, splits)
            self._suspects(corpus.train, [splits[name] for name in self.cfg.data.train_splits])
        asked = None
        if corpus is not None:
            start = start.sized(corpus.vocabulary)
            with self._noting("model"):
                wav2vec2.check(start.model_config)
                self._lengths(corpus.train)
                self._losses(start, corpus)
                asked = self._asked(start, corpus.train)
        devices, timed = self._trial(asked)
        if corpus is not None and asked is not None and devices is not None:
            with self._noting("batches"):
                seen = prognosis.Seen(
                    start=start,
                    corpus=corpus,
                    splits=splits,
                    shapes=tuple(shape["samples"] for shape in self.facts["shapes"]),
                    asked=asked,
                    devices=devices,
                    timed=timed,
                    fresh_head=self.facts["losses"]["fresh_head"],
                    machine=self.facts["machine"],
                )
                ahead = prognosis.Prognosis(self.cfg, seen)
                self.facts |= ahead.facts
                self.findings += ahead.findings
        self.findings = findings.ordered(self.findings)

    @contextlib.contextmanager
    def _noting(self, part: str) -> Iterator[None]:
        """Turns a user's error inside into a fatal finding."""
        try:
            yield
        except errors.FlaxAsrError as error:
            self.findings.append(findings.Finding(part, 1.0, str(error), fatal=True))

    def _origin(self) -> origins.Origin:
        with self._noting("model"):
            return workload.origin(self.cfg.model)
        # Judge the data anyway: every wav2vec 2.0 model has the same number of frames.
        return origins.Origin(Wav2Vec2Config(), None, None, True, True, {})

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
        if "validated" not in data.train_splits:  # from which scored clips are removed
            self.findings += findings.leakage(
                shared,
                {name: len(split) for name, split in others.items()},
                {name: len(split.audio_keys) for name, split in others.items()},
            )

    def _corpus(self, start: origins.Origin, splits: dict[str, survey.Split]) -> corpora.Corpus:
        """Like `corpora.prepared`, with the clips whose length is known."""
        for split in splits.values():
            survey.require_clips(split)
        corpus = corpora.gather(
            self.cfg,
            start,
            splits,
            vocabulary_sentences=survey.Split.vocabulary_sentences,
            usable=survey.Split.judged,
        )
        train = [splits[name] for name in self.cfg.data.train_splits]
        sentences = [sentence for split in train for sentence in split.vocabulary_sentences()]
        self._text(corpus, sentences, "".join(map(corpus.normalizer, sentences)))
        return corpus

    def _text(self, corpus: corpora.Corpus, sentences: list[str], written: str) -> None:
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
        self.findings += findings.normalisation(changes, total)
        self.findings += findings.language_rule(self.cfg, corpus.normalizer.is_default)
        for name, data in {"train": corpus.train, **corpus.scored()}.items():
            rows = len(data) + len(data.left_out)
            self.findings += findings.left_out(data.left_out, rows, f"the {name} splits")
            said = Counter("".join(data.references))
            strange = corpus.vocabulary.lacks(data.references)
            self.findings += findings.unknown(name, strange, sum(said.values()))

    def _suspects(self, train: examples.Examples, splits: Sequence[survey.Split]) -> None:
        oddest = suspects.oddest(train)
        self.facts["suspects"] = [dataclasses.asdict(clip) for clip in oddest if clip.is_suspect]
        if self.pictures is not None:
            heard = suspects.audible(oddest, splits)
            recordings = ((clip.id, clip.describe(), samples) for clip, samples in heard)
            drawn = spectrograms.draw(Path(self.pictures), recordings)
            self.facts["spectrograms"] = [str(path) for path in drawn]

    def _lengths(self, train: examples.Examples) -> None:
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

    def _losses(self, start: origins.Origin, corpus: corpora.Corpus) -> None:
        expected = forecast.losses(corpus.train, start.model_config, corpus.vocabulary.size)
        self.facts["losses"] = dataclasses.asdict(expected) | {
            "reduction": start.model_config.ctc_loss_reduction,
            "fresh_head": not initial_weights.keeps_head(self.cfg, start, corpus.vocabulary),
        }

    def _asked(self, start: origins.Origin, train: examples.Examples) -> trial.Asked:
        """The request to time an update in the most frequent shape of training batches."""
        cfg = self.cfg
        shapes = static_shapes.training(cfg, start.model_config, train)
        counts = np.bincount(
            buckets.row_shapes(train.samples, shapes.samples), minlength=len(shapes.samples)
        )
        commonest = int(counts.argmax())
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
                    " process using them? Is jax installed for them?",
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
                    f"an update in the most frequent shape does not run ({timed.reason}:"
                    f" {ascii(timed.detail[:400])[1:-1]}). If memory is short, lower"
                    " train.per_device_train_batch_size or set train.gradient_checkpointing.",
                    fatal=True,
                )
            )
        return devices, timed
