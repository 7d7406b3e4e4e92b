"""Problems that can be found before a run, and how much of the run each would spoil.

The cost is the share that is lost of the run's time or data, or of the meaning of its scores. If it
cannot be known, it is an estimate, with its reason in a comment.
"""

import dataclasses
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from flax_asr import config, text
from flax_asr.data import shards

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config

_FEW_UPDATES = 300
_LONG_DAYS = 3.0

REASONS = {
    "missing": "have no audio",
    "crashed": "kill their decoder",
    "timeout": "take too long to decode",
    "failed": "make the decoder fail",
    "empty": "are empty",
    "damaged": "are damaged",
    "truncated": "are cut short",
    "not_finite": "hold NaN or infinity",
    "silent": "are silent",
    "too_long": "are longer than data.max_seconds",
    "too_short": "are shorter than data.min_seconds",
    "empty_transcript": "have no transcript left after normalisation",
    "label_too_long": "have more labels than frames: CTC cannot align them",
    "duplicate": "are there twice",
    "same_audio": "sound bit for bit like another one",
    "held_out_clip": "of the training splits are scored, and so are not trained on",
    "held_out_speaker": "of the training splits have a speaker who is scored",
    "held_out_sentence": "of the training splits have a sentence that is scored",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One problem.

    Attributes:
        name: a key for programs.
        cost: share of the run that it spoils, 0 to 1; without meaning if `fatal`.
        message: what, where, and what to do.
        fatal: whether the run cannot work.
    """

    name: str
    cost: float
    message: str
    fatal: bool = False


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Fatal findings first, then by cost, the costliest first."""
    return sorted(findings, key=lambda found: (not found.fatal, -found.cost, found.name))


def unwritable(option: str, place: Mapping[str, object]) -> Iterator[Finding]:
    """A folder that cannot be written."""
    if place["writable"] is False:
        yield Finding(
            "unwritable",
            1.0,
            f"{place['path']} cannot be written: give another --{option}.",
            fatal=True,
        )


def leakage(
    shared: Mapping[str, Mapping[str, int]], clips: Mapping[str, int], decoded: Mapping[str, int]
) -> Iterator[Finding]:
    """Scored clips that share something with training; audio is compared if it was decoded."""
    meanings = {
        "clips": "are trained on",
        "audio": "sound bit for bit like a training clip",
        "speakers": "have a speaker who is trained on",
        "sentences": "have a sentence that is trained on",
    }
    for split, counts in shared.items():
        for what, count in counts.items():
            seen = (decoded if what == "audio" else clips)[split]
            if count:
                yield Finding(
                    f"shared_{what}",
                    count / seen,
                    f"{count} of {seen} clips of {split} {meanings[what]}: its scores will"
                    " be too good. Use the release's own train, dev and test"
                    " splits, or train on `validated`, from which these are taken out.",
                )


def incomplete(split: str, read: int) -> Iterator[Finding]:
    """A source that takes too long to read completely."""
    yield Finding(  # the run itself is not affected
        "incomplete",
        0.001,
        f"only {read} clips of {split} could be read in time, so updates and days are those of a"
        " smaller corpus: unpack the archive, or run `flax-asr prepare` first.",
    )


def left_out(entries: Sequence[shards.LeftOut], judged: int, where: str) -> Iterator[Finding]:
    """Clips that will not be used, by reason."""
    by_reason: dict[str, list[shards.LeftOut]] = {}
    for entry in entries:
        by_reason.setdefault(entry.reason, []).append(entry)
    for reason, found in by_reason.items():
        meaning = REASONS.get(reason, f"cannot be used ({reason})")
        first = f"{ascii(found[0].id)[1:-1]} {ascii(found[0].detail)[1:-1]}".strip()
        yield Finding(
            reason,
            len(found) / judged,
            f"{len(found)} of {judged} clips of {where} {meaning}; the first: {first}.",
        )


def language_rule(cfg: config.Config, is_default: bool) -> Iterator[Finding]:
    """A language without its own normalisation rules."""
    if is_default and cfg.text.normalization is None:
        yield Finding(
            "default_normalization",
            0.02,
            f"there are no normalisation rules for {cfg.data.language}, so the default ones are"
            " used: see what `flax-asr prepare` says that they change, or set text.normalization.",
        )


def normalisation(changes: Sequence[text.Change], characters: int) -> Iterator[Finding]:
    """Letters and digits that the normalisation removes."""
    gone = [c for c in changes if not c.after and unicodedata.category(c.before[0])[0] in "LN"]
    lost = sum(change.count for change in gone)
    if lost:
        shown = "; ".join(change.describe() for change in gone[:3])
        yield Finding(
            "letters_removed",
            lost / characters,
            f"text.normalization removes {lost} letters or digits: {shown}. Are they not spoken?",
        )


def unknown(name: str, strange: Mapping[str, int], characters: int) -> Iterator[Finding]:
    """Characters without a token: no output can ever be right there."""
    count = sum(strange.values())
    if count:
        shown = " ".join(ascii(c)[1:-1] if not c.isprintable() else c for c in list(strange)[:10])
        yield Finding(
            "unknown_characters",
            count / characters,
            f"{count} of {characters} characters of {name} are not in the vocabulary ({shown}):"
            f" its character error rate cannot fall below {count / characters:.2%}.",
        )


def batches(cfg: config.Config, padding: float, group_norm: bool) -> Iterator[Finding]:
    """Computing for nothing, and encoders that notice it."""
    if group_norm:
        yield Finding(
            "group_norm",
            padding,
            f"this encoder normalises over whole padded clips: its output changes with the padding"
            f" ({padding:.0%} of a batch), in training and in scoring. More data.num_buckets make"
            " it less; encoders with layer normalisation (XLS-R) do not have it.",
        )
    elif padding > 0.15:
        yield Finding(
            "padding",
            padding,
            f"{padding:.0%} of what is computed is padding: raise data.num_buckets"
            f" ({cfg.data.num_buckets} now) or lower data.max_seconds.",
        )


def schedule(cfg: config.Config, updates: int, fresh_head: bool) -> Iterator[Finding]:
    """Problems with the schedule, the length of the run, or when it is scored."""
    warmup = cfg.optim.warmup_updates(updates)
    steps, epochs = cfg.train.max_steps, cfg.train.num_train_epochs
    if warmup > updates / 5:
        rest = "" if warmup < updates else ": the rate never gets to optim.learning_rate"
        yield Finding(
            "warmup",
            min(1.0, warmup / updates),
            f"the warm-up takes {warmup} of {updates} updates, more than a fifth of the"
            f" run{rest}; lower optim.warmup_steps or optim.warmup_fraction.",
        )
    if fresh_head and warmup == 0:
        yield Finding(  # it may cost nothing or all of the pretraining
            "no_warmup",
            0.5,
            "a fresh head without warm-up can ruin the encoder; set optim.warmup_steps.",
        )
    if fresh_head and updates < _FEW_UPDATES:
        yield Finding(  # CTC writes blanks only for its first hundreds of updates
            "few_updates",
            0.5,
            f"{updates} updates are few: a fresh head outputs nothing but blanks for the first"
            f" few hundred. Raise train.{'num_train_epochs' if steps is None else 'max_steps'} or"
            " lower train.global_batch_size.",
        )
    if steps is not None and epochs != config.TrainConfig.num_train_epochs:
        yield Finding(
            "no_effect",
            0.01,
            f"train.num_train_epochs {epochs:g} has no effect, as train.max_steps {steps} sets the"
            " length of the run: change that, or set it to null.",
        )
    if cfg.data.eval_splits and updates <= cfg.train.eval_steps:
        yield Finding(
            "one_evaluation",
            0.05,
            f"train.eval_steps {cfg.train.eval_steps} is not less than the {updates} updates: only"
            " the last checkpoint is scored, so none can be chosen.",
        )
    if set(cfg.data.eval_splits) & set(cfg.data.test_splits):
        yield Finding(
            "selected_on_test",
            0.05,
            "data.eval_splits and data.test_splits share a split: the best checkpoint is chosen on"
            " its own test data.",
        )


def without_effect(
    cfg: config.Config, model_config: "Wav2Vec2Config", most_frames: int
) -> Iterator[Finding]:
    """Options of the model that have no effect.

    Args:
        cfg: the configuration, with overrides in `model.config`.
        model_config: the model's configuration after all overrides.
        most_frames: frames of the longest training clip.
    """
    length = model_config.mask_time_length
    masked = model_config.apply_spec_augment and model_config.mask_time_prob > 0
    if masked and length > most_frames:
        yield Finding(
            "masks",
            0.1,
            f"no clip is masked: a span has {length} frames (mask_time_length) and the longest"
            f" training clip {most_frames}.",
        )
    for name in ("vocab_size", "pad_token_id"):
        has = getattr(model_config, name)
        if cfg.model.config.get(name, has) != has:
            yield Finding(
                "no_effect",
                0.01,
                f"model.config.{name} {cfg.model.config[name]} has no effect: the vocabulary"
                f" makes it {has}.",
            )


def precision(mixed_precision: str, platform: str) -> Iterator[Finding]:
    """A precision that the devices do not compute in natively."""
    if platform == "tpu" and mixed_precision == "fp16":
        yield Finding(
            "precision",
            0.02,
            "TPUs compute in bf16: train.mixed_precision fp16 only adds a loss scale.",
        )
    if platform == "cpu" and mixed_precision != "fp32":
        yield Finding(  # from no difference (with AMX) to several times slower
            "precision",
            0.3,
            f"most CPUs only emulate {mixed_precision}: train.mixed_precision fp32 is faster.",
        )


def duration(days: float, cheap: tuple[int, float] | None, least: bool) -> Iterator[Finding]:
    """A run that takes long on this machine."""
    about = "at least" if least else "about"
    if days > _LONG_DAYS:
        way_out = (
            f" With --model.trainable_layers {cheap[0]}: {about} {_days(cheap[1])}."
            if cheap is not None and cheap[1] < days
            else ""
        )
        yield Finding(
            "duration",
            min(1.0, days / 30),
            f"on this machine the run takes {about} {_days(days)}."
            f"{way_out} Fewer clips: data.max_train_clips.",
        )


def room(needed: int, free: int | None, what: str, fatal: bool) -> Iterator[Finding]:
    """Too little disk or memory, or only just enough."""
    if free is not None and needed > 0.8 * free:
        short = needed > free
        yield Finding(
            "room",
            0.5,  # the estimate is not precise to a fifth
            f"{what}: about {gigabytes(needed)} are needed and {gigabytes(free)} are free.",
            fatal=short and fatal,
        )


def gigabytes(count: int) -> str:
    """A number of bytes as text."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _days(days: float) -> str:
    return duration_text(days * 86400)


def duration_text(seconds: float) -> str:
    """A duration as text, in one unit."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
