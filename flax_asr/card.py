"""The model card: README.md of a run, in the form of the Hugging Face Trainer's cards."""

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax_asr
from flax_asr import (
    atomic,
    checkpoint,
    config,
    hyperparameters,
    inventory,
    languages,
    markdown,
    run_folder,
    scoring,
)
from flax_asr.record import curves, lineage, runlog

COLUMNS = {
    "eval_loss": "Validation Loss",
    "eval_wer": "Wer",
    "eval_cer": "Cer",
}
"""Columns of the table of results that follow training loss, epoch and step."""

PACKAGES = {
    "JAX": "jax",
    "Flax": "flax",
    "Optax": "optax",
    "Orbax": "orbax-checkpoint",
    "Transformers": "transformers",
    "Datasets": "datasets",
    "NumPy": "numpy",
}
_TASK = ("automatic-speech-recognition", "Automatic Speech Recognition")
_NOT_FINITE = "not finite"
_UNSPACED_REASON = (
    "The character error rate (CER) is the figure to look at: the language is written without"
    " spaces, so a whole sentence is one word, wrong with its first wrong character; the word error"
    " rate (WER) says little, and rises above 1 where a model writes spaces."
)


def write(run: Path, saved: checkpoint.SavedModel) -> Path:
    """Writes RUN/README.md for the checkpoint that is exported; returns its path."""
    content = render(run.name, saved, runlog.read(run), has_curves=(run / curves.FILE).is_file())
    with atomic.replacing(run / run_folder.CARD) as unfinished:
        unfinished.write_text(content, encoding="utf-8")
    return run / run_folder.CARD


def render(
    name: str,
    saved: checkpoint.SavedModel,
    history: Sequence[Mapping[str, Any]],
    *,
    has_curves: bool = False,
    is_export: bool = False,
) -> str:
    """The card as text.

    Args:
        name: the model's name.
        saved: the checkpoint that is described.
        history: the events of log.jsonl.
        has_curves: whether curves.png is beside the card.
        is_export: whether the card is part of an export, with the weights beside it.
    """
    weights = "It" if is_export else "The folder `export`"
    cfg = inventory.meta_config(saved.meta)
    scores = _scores(saved, history)
    sections = [
        _metadata(name, saved, cfg, scores),
        f"# {markdown.escape(name)}",
        _introduction(saved, cfg, scores),
        markdown.section("Model description", _description(saved)),
        markdown.section(
            "Intended uses & limitations",
            f"Transcribes recordings of one speaker, 16 kHz. {weights} is read by `transformers`"
            ' (`pipeline("automatic-speech-recognition", model=...)`).',
        ),
        markdown.section("Training and evaluation data", _data(saved, cfg)),
        "## Training procedure",
        markdown.section("Training hyperparameters", _hyperparameters(saved.meta, cfg), level=3),
        markdown.section("Training results", table(history) + _early_stop(saved, history), level=3),
        *([f"![Losses and error rates over the steps]({curves.FILE})"] if has_curves else []),
        markdown.section("Framework versions", markdown.bullets(versions()), level=3),
    ]
    return "\n\n".join(sections) + "\n"


def table(history: Sequence[Mapping[str, Any]]) -> str:
    """The evaluations of a run, one per line, with the training loss logged last before each.

    Source: transformers' `modelcard.parse_log_history` and `make_markdown_table`.
    """
    names = [
        name for name in COLUMNS if any({name, "eval_clips"} & event.keys() for event in history)
    ]
    lines = [["Training Loss", "Epoch", "Step", *(COLUMNS[name] for name in names)]]
    training_loss = "No log"
    for event in history:
        if "learning_rate" in event or "loss" in event:
            training_loss = _number(event.get("loss"))
        if _was_scored(event, "eval"):
            values = [_number(event.get(name)) for name in names]
            epoch = _number(round(float(event["epoch"]), 2))
            lines.append([training_loss, epoch, str(event["step"]), *values])
    if len(lines) == 1:
        return "The run was not evaluated during training."
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join(f":{'-' * width}:" for width in widths) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])


def _early_stop(saved: checkpoint.SavedModel, history: Sequence[Mapping[str, Any]]) -> str:
    ends = [event for event in history if "stopped_early_after" in event]
    if not ends:
        return ""
    return (
        f"\n\nTraining stopped early, after update {ends[-1]['step']} of"
        f" {saved.meta.facts['updates']}: evaluations without a better score:"
        f" {ends[-1]['stopped_early_after']}."
    )


def versions() -> dict[str, str]:
    """Installed versions of the packages that affect the results."""
    found = {"flax_asr": flax_asr.__version__, "Python": platform.python_version()}
    for name, package in PACKAGES.items():
        found[name] = importlib.metadata.version(package)
    return found


def _was_scored(figures: Mapping[str, Any], which: str) -> bool:
    """Whether there are `eval` or `test` scores; a non-finite loss is absent from the log."""
    return bool({f"{which}_loss", f"{which}_clips"} & figures.keys())


def _number(value: float | None) -> str:
    """A number with at most four decimals; None stands for one that was not finite.

    Source: transformers' `modelcard._maybe_round`.
    """
    if value is None:
        return _NOT_FINITE
    written = str(value)
    if isinstance(value, float) and len(written.partition(".")[2]) > 4:
        return f"{value:.4f}"
    return written


def _rounded(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else _NOT_FINITE


def _scores(
    saved: checkpoint.SavedModel, history: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """The scores of the described checkpoint, if any, under `eval` and `test`."""
    tests = [
        event
        for event in history
        if _was_scored(event, "test")
        and ("best_step" not in event or event["best_step"] == saved.step)
    ]
    sources = {"eval": saved.metrics, "test": tests[-1] if tests else {}}
    return {
        which: {
            name: float(figures.get(f"{which}_{name}", math.nan))
            for name in ("loss", "wer", "cer", "real_wer", "real_cer")
            if name == "loss" or f"{which}_{name}" in figures
        }
        for which, figures in sources.items()
        if _was_scored(figures, which)
    }


def _spaced(cfg: config.Config) -> bool:
    return not languages.writes_without_spaces(cfg.data.language)


def _split_names(cfg: config.Config, which: str) -> str:
    named = {
        "train": cfg.data.train_splits,
        "eval": cfg.data.eval_splits,
        "test": cfg.data.test_splits,
    }
    return "+".join(named[which])


def _padded(scores: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether the error rates include padding, as in the scripts of 2022."""
    return any("real_cer" in figures for figures in scores.values())


def _rule(
    saved: checkpoint.SavedModel, cfg: config.Config, scores: Mapping[str, Mapping[str, float]]
) -> str:
    return scoring.rule(saved.normalization, _spaced(cfg), _padded(scores))


def _metadata(
    name: str,
    saved: checkpoint.SavedModel,
    cfg: config.Config,
    scores: Mapping[str, Mapping[str, float]],
) -> str:
    """The YAML block, written by huggingface_hub."""
    from huggingface_hub import EvalResult, ModelCardData

    splits = saved.meta.facts["splits"]
    metrics = ["wer", "cer"] if _spaced(cfg) else ["cer", "wer"]
    results = [
        EvalResult(
            task_type=_TASK[0],
            task_name=_TASK[1],
            dataset_type="common_voice",
            dataset_name=" ".join(f"{splits[which]['release']} {cfg.data.language}".split()),
            dataset_config=cfg.data.language,
            dataset_split=_split_names(cfg, which),
            dataset_args={"sha256": splits[which]["hash"], "clips": splits[which]["clips"]},
            metric_type=metric,
            metric_name=f"{'Test' if which == 'test' else 'Validation'} {metric.upper()}",
            metric_value=round(figures[metric], 4),
            metric_args={"rule": _rule(saved, cfg, scores)},
        )
        for which, figures in reversed(scores.items())
        for metric in metrics
        if metric in figures and math.isfinite(figures[metric])
    ]
    base = lineage.hub_model(saved.meta.facts)
    metadata = ModelCardData(
        language=[cfg.data.language],
        # The licence of Facebook's wav2vec 2.0 weights; the licence of others is not known here.
        license="apache-2.0" if (base or "").startswith("facebook/wav2vec2-") else None,
        library_name="transformers",
        pipeline_tag=_TASK[0],
        base_model=base,
        tags=[_TASK[0], "common_voice", "generated_from_trainer", "wav2vec2", "jax"],
        datasets=["common_voice"],
        metrics=metrics,
        model_name=name,
        # Without a result huggingface_hub refuses model_name's companion.
        eval_results=results or None,
    )
    return f"---\n{metadata.to_yaml()}\n---"


def _introduction(
    saved: checkpoint.SavedModel,
    cfg: config.Config,
    scores: Mapping[str, Mapping[str, float]],
) -> str:
    facts = saved.meta.facts
    release = markdown.escape(facts["splits"]["train"]["release"])
    dataset = markdown.escape(f"COMMON_VOICE - {cfg.data.language.upper()}")
    lines = [f"This model {_origin(facts)} on the {dataset} dataset ({release})."]
    for which, title in (("eval", "evaluation"), ("test", "test")):
        if which in scores:
            lines.append(f"It achieves the following results on the {title} set:")
            lines += [*_results(scores[which], _spaced(cfg)), ""]
    if set(cfg.data.eval_splits) & set(cfg.data.test_splits):
        lines.append(
            "**The test score is too good**: the same split chose the checkpoint"
            f" ({markdown.escape(_split_names(cfg, 'eval'))}) and was scored with it."
        )
    elif "eval" in scores:
        lines.append("The evaluation set chose the checkpoint.")
    if not _spaced(cfg):
        lines.append(_UNSPACED_REASON)
    lines.append(f"Scored: {markdown.escape(_rule(saved, cfg, scores))}.")
    if _padded(scores):
        lines.append(
            "**The error rates are those of the scripts of 2022**, which read the output over"
            " padding too; over real frames only is what the model does to a clip by itself."
        )
    return "\n".join(lines)


def _origin(facts: Mapping[str, Any]) -> str:
    base, hub = facts["started_from"], lineage.hub_model(facts)
    link = f"[{hub}](https://huggingface.co/{hub})"
    if base is None:
        return "was trained from random weights"
    if base == hub:
        return f"is a fine-tuned version of {link}"
    origin = f"is a fine-tuned version of the local model {_called(base, None)}"
    return origin if hub is None else f"{origin}, which goes back to {link},"


def _results(figures: Mapping[str, float], spaced: bool) -> list[str]:
    """The scores of a set, one per line; first the error rate that suits its language."""
    order = ["loss", "wer", "cer"] if spaced else ["cer", "loss", "wer"]
    return [
        *(f"- {name.capitalize()}: {_rounded(figures[name])}" for name in order if name in figures),
        *(
            f"- {name.capitalize()} over real frames only: {figures[f'real_{name}']:.4f}"
            for name in order
            if f"real_{name}" in figures
        ),
    ]


def _description(saved: checkpoint.SavedModel) -> str:
    shape = saved.model_config
    facts = saved.meta.facts
    earlier = lineage.parse(lineage.earlier(facts))
    told = {
        f"Before, {number}": f"from {_called(run.started_from, run.revision)},"
        f" {run.updates} updates on {markdown.escape(run.release)} {markdown.escape(run.language)};"
        f" head: {markdown.escape(run.head)}"
        for number, run in enumerate(earlier, 1)
    }
    extensions = facts.get("extensions", [])
    longer = ", ".join(
        f"made longer after update {int(e['after'])}, when {int(e['planned'])} were planned"
        for e in extensions
    )
    history = {
        "Architecture": f"wav2vec 2.0 with a CTC head, {shape.num_hidden_layers} layers of"
        f" {shape.hidden_size}, {saved.vocabulary.size} symbols",
        **told,
        "Started from": f"{_called(facts['started_from'], facts['revision'])};"
        f" head: {markdown.escape(facts['head'])}",
        "This checkpoint": f"after {saved.step} updates" + (f"; {longer}" if longer else ""),
    }
    decay = inventory.meta_config(saved.meta).optim.ema_decay
    if decay is not None:
        history["Weights"] = (
            f"the exponential moving average over the updates, decay {decay:g}; it is what was"
            " scored, and what is exported"
        )
    return markdown.bullets(history, ": ")


def _called(started_from: str | None, revision: str | None) -> str:
    """A model's name for the public; for a folder only its last part, never the whole path."""
    if started_from is None:
        return "random weights"
    if revision is None:
        return markdown.escape(Path(started_from).name)
    return f"{markdown.escape(started_from)} at {markdown.escape(revision)}"


def _data(saved: checkpoint.SavedModel, cfg: config.Config) -> str:
    lines = ["| Set | Splits | Release | Clips | Hours | sha256 |", "|---|---|---|---:|---:|---|"]
    for which, split in saved.meta.facts["splits"].items():
        cells = [
            which,
            markdown.escape(_split_names(cfg, which)),
            markdown.escape(split["release"]),
            split["clips"],
            f"{split['seconds'] / 3600:.2f}",
            f"`{split['hash'][:16]}`",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _hyperparameters(meta: inventory.Meta, cfg: config.Config) -> str:
    listed = markdown.bullets(hyperparameters.describe(meta, cfg), ": ")
    return f"The following hyperparameters were used during training:\n{listed}"
