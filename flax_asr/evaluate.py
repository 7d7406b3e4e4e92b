"""`flax-asr evaluate`, and the scoring of examples: every clip is scored once."""

import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_asr import (
    comparison,
    compilation,
    config,
    differences,
    errors,
    loading,
    metrics,
    parallel,
    score_files,
    scored_splits,
    scoring,
    static_shapes,
    step,
    text,
)
from flax_asr.console import model_options, progress, results, terminal
from flax_asr.data import buckets, examples, loader, shards
from flax_asr.hosts import cluster, multihost
from flax_asr.record import json_lines, left_out

Forward = Callable[[loader.Batch], Sequence[np.ndarray]]
"""Runs the model on this host's rows of a group. Returns three arrays for all rows of the group:
loss [rows], most likely symbol of each frame [rows frames], number of real frames [rows]."""


def score(
    forward: Forward,
    data: examples.Examples,
    plan: buckets.EvalPlan | buckets.InOrder,
    compared: comparison.Comparison,
    *,
    seed: int,
    tokens: Sequence[int] | None = None,
    predictions: list[dict[str, Any]] | None = None,
    padded: bool = False,
) -> scoring.Scores:
    """Scores every example once.

    Args:
        forward: runs the model on a batch.
        data: the examples to score.
        plan: their batches.
        compared: how the model's symbols are compared with the references.
        seed: the seed of the bootstrap.
        tokens: label width of each shape of the plan; by default what these examples need.
        predictions: a list to which one object a clip is appended, with its reference and
            hypothesis, for `json_lines.write`. It names no speaker, as Common Voice asks.
        padded: also score as the scripts of 2022 did: every clip's frames up to the longest clip
            of the batch are decoded, every space counts, and unknown characters of the reference
            are "[UNK]", which the model can output.
    """
    spaced = compared.spaced
    counts = scoring.Counts.empty(len(data))
    host, hosts = jax.process_index(), jax.process_count()
    with (
        loader.evaluation(data, plan, host, hosts, tokens=tokens) as batches,
        progress.Progress(len(data), "scoring", "clips") as bar,
    ):
        for batch, group in batches:
            losses, ids, frame_lengths = forward(batch)
            real = group.rows >= 0
            longest = int(frame_lengths[real].max())
            for place in np.flatnonzero(real):
                row = int(group.rows[place])
                frames = ids[place, : frame_lengths[place]]
                reference, hypothesis, written = compared.texts(data.references[row], frames)
                characters = metrics.character_errors(reference, hypothesis, spaced)
                words = metrics.word_errors(reference, hypothesis)
                counts.losses[row] = losses[place]
                counts.characters[row] = characters.errors, characters.units
                counts.words[row] = words.errors, words.units
                counts.frames[row] = (frames == compared.writes.blank).sum(), len(frames)
                if padded:
                    heard = ids[place, :longest]
                    old_characters, old_words = compared.padded_errors(data.labels(row), heard)
                    counts.padded_characters[row] = old_characters.errors, old_characters.units
                    counts.padded_words[row] = old_words.errors, old_words.units
                if predictions is not None:
                    predictions.append(_prediction(data, row, written, characters))
            bar.advance(int(real.sum()))
    return scoring.summary(counts, data, spaced, padded, compared.rule(padded), seed)


def _prediction(
    data: examples.Examples, row: int, written: str, characters: metrics.ErrorCounts
) -> dict[str, Any]:
    """A clip's object in the file of predictions."""
    return {
        "id": data.ids[row],
        "reference": data.references[row],
        "hypothesis": written,
        "errors": characters.errors,
        "units": characters.units,
    }


def compiled(
    loaded: loading.LoadedModel,
    cfg: config.Config,
    shapes: static_shapes.Shapes,
    devices: parallel.Devices,
) -> Forward:
    """The model on the devices, compiled for these shapes."""
    per_device = cfg.train.per_device_eval_batch_size
    params = devices.replicate(step.flat(loaded.params))
    function = parallel.evaluate(loaded.objective(cfg.train.mixed_precision), devices)
    jobs = {
        ("evaluate", samples): (
            function,
            (devices.replicated_shapes(params), devices.batch_shapes(per_device, samples, tokens)),
        )
        for samples, tokens in reversed(list(shapes))
    }
    return parallel.forward(compilation.compile_shown(jobs), params, devices, per_device)


def command(
    model: str,
    overrides: Sequence[str],
    json_file: str | None,
    legacy: bool = False,
) -> None:
    """`flax-asr evaluate`: scores the test splits of the model's configuration.

    Reference and hypothesis of every clip are written to a file: for a run in its folder, for other
    models and for runs whose folder is read-only in the current folder; if that cannot be written
    either, none is kept. `score_files` names the file, and the one beside it that lists the clips
    left out.

    Args:
        model: the model, as for `loading.load`.
        overrides: options of the configuration.
        json_file: file for JSON lines, one object per split; "-" is standard output.
        legacy: also score as the scripts of 2022 did.

    Raises:
        ModelError: the model cannot be loaded, or its scores of some clip are NaN.
        ConfigError, DataError: the splits to score are not known, or cannot be read.
    """
    model_options.check("evaluate", overrides)
    cluster.join()
    with multihost.Hosts() as hosts:
        _score_splits(hosts, model, overrides, json_file, legacy)


def _score_splits(
    hosts: multihost.Hosts,
    model: str,
    overrides: Sequence[str],
    json_file: str | None,
    legacy: bool,
) -> None:
    loaded = loading.load(model)
    cfg = scored_splits.configure(loaded, overrides)
    normalize = text.normalizer(cfg.normalization)
    as_trained = loaded.writes_by(normalize) or not normalize.steps
    sets = scored_splits.prepared(loaded, cfg, normalize, hosts)
    if hosts.count > 1:
        found = {f"clips of {name}": data.hash for name, data in sets.items()}
        found |= {"weights": multihost.digest(loaded.params), "--legacy": legacy}
        hosts.agree("data, model or options", differences.same_on_all_hosts(cfg) | found)
    devices = parallel.Devices()
    shapes = static_shapes.scoring(cfg, loaded.config, list(sets.values()))
    forward = compiled(loaded, cfg, shapes, devices)
    hosts.wait()
    rows = devices.count * cfg.train.per_device_eval_batch_size
    people = results.people(json_file) if hosts.is_first else io.StringIO()
    scored = functools.partial(
        score,
        forward,
        compared=comparison.Comparison(
            loaded.vocabulary,
            cfg.data.language,
            normalize.spec,
            rewrite=None if as_trained else normalize,
        ),
        seed=cfg.seed,
        tokens=shapes.tokens,
    )
    with results.writer(json_file if hosts.is_first else None) as write:
        for name, data in sets.items():
            predictions: list[dict[str, Any]] = []
            in_groups = buckets.EvalPlan(data.samples, shapes.samples, rows)
            scores = scored(data, in_groups, predictions=predictions)
            if scores.not_numbers:
                raise errors.ModelError(
                    f"{model}, split {name}, {scores.not_numbers} of {scores.clips} clips:"
                    f" {loading.overflow(cfg.train.mixed_precision)}."
                )
            lines = filter(None, (scores.describe(name), scores.table()))
            terminal.show("\n".join(lines), people)

            place = score_files.predictions(loaded, cfg, normalize, name, data)
            unused = _keep(predictions, place if hosts.is_first else None, name, data)
            said = "no predictions are kept: the current folder cannot be written"
            said = said if place is None else f"predictions: {place}"
            terminal.show(f"  {_caveats(loaded, data, unused)}{said}", people)
            line = _result(name, scores, data) | {"predictions": place and str(place)}
            if legacy:
                in_order = buckets.InOrder(data.samples, shapes.samples, rows)
                old = scored(data, in_order, padded=True)
                line |= _legacy_result(old, rows, people)
            write(line)


def _keep(
    predictions: Sequence[dict[str, Any]], place: Path | None, split: str, data: examples.Examples
) -> Path | None:
    """Writes the file of predictions, if any; returns the path of the list of clips left out."""
    if place is None:
        return None
    json_lines.write(place, predictions)
    return left_out.beside(place, split, data)


def _legacy_result(old: scoring.Scores, rows: int, people: io.TextIOBase) -> dict[str, Any]:
    """The keys that `--legacy` adds to a split's object; also prints the scores for people."""
    cer, wer = old.padded.cer.value, old.padded.wer.value
    terminal.show(
        f"  as the scripts of 2022 scored, padded in batches of {rows}: CER {cer:.4f}, WER"
        f" {wer:.4f}; {old.rule}",
        people,
    )
    return {"legacy_wer": wer, "legacy_cer": cer, "legacy_rule": old.rule}


def _result(name: str, scores: scoring.Scores, data: examples.Examples) -> dict[str, Any]:
    """A split's object for `--json`."""
    line: dict[str, Any] = {"split": name, **scores.as_metrics("eval")}
    for what in ("clips", "release", "hash", "rule"):
        line[what] = line.pop(f"eval_{what}")
    line |= {"seconds": round(data.seconds, 2), "left_out": data.left_out_summary()}
    line["not_prepared"] = shards.summary(e for split in data.splits for e in split.left_out)
    line["groups"] = [dataclasses.asdict(group) for group in scores.groups]
    return line


def _caveats(
    loaded: loading.LoadedModel, data: examples.Examples, unused: Path | None = None
) -> str:
    """What a reader of the scores must know, one remark per line.

    Args:
        loaded, data: the model and the examples that were scored.
        unused: the file that lists the clips left out.
    """
    found = [
        f"not prepared: {shards.summary(split.left_out)} ({split.folder}/left_out.jsonl names each)"
        for split in data.splits
        if split.left_out
    ]
    if data.left_out:
        names = f" ({unused} names each)" if unused else ""
        found.append(f"left out: {data.left_out_summary()}{names}")
    if not loaded.ignores_padding:
        found.append(
            "this model's output changes with the padding: its scores depend a little on the"
            " batches"
        )
    return "".join(f"{line}\n  " for line in found)
