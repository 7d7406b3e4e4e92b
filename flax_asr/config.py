"""The configuration: frozen dataclasses, one for each concern; options.py reads their values.

A key that does not exist, a value of the wrong type or out of range is a `ConfigError` that names
the key and the nearest right one. Scalars are YAML 1.2: `no` is a string, `1e-8` is a number.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flax_asr import checks, errors, options, yaml_file


@dataclass(frozen=True)
class AugmentConfig:
    """How training clips are changed, drawn anew for every clip in every epoch.

    Each is a range, [low, high], from which values are drawn uniformly; null turns it off.

    Attributes:
        speed: factors of speed; pitch and length change with it.
        pitch: semitones; the length stays. It takes more time than all the others.
        gain_db: decibels. No effect on a model that normalises its input.
        noise_snr_db: signal-to-noise ratio of added white noise, in decibels.
    """

    speed: tuple[float, float] | None = None
    pitch: tuple[float, float] | None = None
    gain_db: tuple[float, float] | None = None
    noise_snr_db: tuple[float, float] | None = None

    def __post_init__(self):
        for name, least, most in (
            ("speed", 0.5, 2.0),
            ("pitch", -12.0, 12.0),
            ("gain_db", -60.0, 60.0),
            ("noise_snr_db", -20.0, 100.0),
        ):
            checks.inside(f"data.augment.{name}", getattr(self, name), least, most)

    @property
    def fastest(self) -> float:
        """The largest factor by which a clip may become shorter."""
        return 1.0 if self.speed is None else max(1.0, self.speed[1])


@dataclass(frozen=True)
class DataConfig:
    """Which recordings are used, and how they are cut into batches.

    Attributes:
        source: a release folder, its .tar.gz, `parquet:GLOB`, `hf:NAME[:CONFIG]`, or a
            .csv / .tsv / .jsonl manifest with the columns path and sentence.
        language: the code of the language as Common Voice writes it, for example zh-HK.
        train_splits: the splits to train on.
        eval_splits: the splits scored during training, which choose the best checkpoint.
        test_splits: the splits scored once, at the end, with the best checkpoint.
        prepared_dir: where decoded audio is kept, also gs://BUCKET/PATH; by default a folder beside
            output_dir.
        text_column: the column of the transcript, if it is not `sentence`.
        min_seconds: shorter clips are left out.
        max_seconds: longer clips are left out.
        num_buckets: how many padded lengths training batches have at most; scoring has half as
            many.
        num_workers: decoding processes; by default one for each core.
        max_train_clips: use at most this many training clips, drawn once from the seed.
        max_eval_clips: use at most this many clips of each eval and test split.
        trim_silence: cut silence from both ends of every clip.
        cache_features: with model.trainable_layers, compute the frozen layers' output for each
            training clip once, and keep it beside the prepared data.
    """

    source: str | None = None
    language: str | None = None
    train_splits: tuple[str, ...] = ("train",)
    eval_splits: tuple[str, ...] = ("dev",)
    test_splits: tuple[str, ...] = ("test",)
    prepared_dir: str | None = None
    text_column: str | None = None
    min_seconds: float = 0.0
    max_seconds: float = 20.0
    num_buckets: int = 12
    num_workers: int | None = None
    max_train_clips: int | None = None
    max_eval_clips: int | None = None
    trim_silence: bool = False
    cache_features: bool = False
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self):
        checks.at_least("data.min_seconds", self.min_seconds, 0)
        checks.at_least("data.num_buckets", self.num_buckets, 1)
        for name in ("num_workers", "max_train_clips", "max_eval_clips"):
            checks.at_least(f"data.{name}", getattr(self, name), 1)
        for name in ("train_splits", "eval_splits", "test_splits"):
            checks.splits(f"data.{name}", getattr(self, name))
        if self.max_seconds <= self.min_seconds:
            raise errors.ConfigError(
                f"data.max_seconds is {self.max_seconds}: it must be larger than"
                f" data.min_seconds ({self.min_seconds})."
            )


@dataclass(frozen=True)
class TextConfig:
    """How transcripts become labels.

    Attributes:
        normalization: a language code or a list of steps, which may begin with such a code (or with
            `default`) and extend it; by default data.language's rules.
        min_count: characters that occur less often in the training text become [UNK].
        vocabulary: a vocab.json to use instead of the training text's characters, or a model (hub
            id, folder, run) whose vocabulary it is.
    """

    normalization: str | tuple[str | dict[str, Any], ...] | None = None
    min_count: int = 1
    vocabulary: str | None = None

    def __post_init__(self):
        checks.at_least("text.min_count", self.min_count, 1)


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained, and which part of it.

    Attributes:
        pretrained: a hub id or a folder (a run folder too); null starts from random weights.
        config: overrides of fields of transformers.Wav2Vec2Config.
        freeze_feature_encoder: do not train the convolutions, which saves their gradient and
            optimiser state.
        freeze_encoder_steps: how many updates at the start train the head only.
        trainable_layers: train only the head and this many of the top layers.
        reset_head: start with a fresh head even if the vocabulary is the same, or cannot be read.
        attention: the implementation of attention: `xla` is the plain one, `pallas` a kernel for
            TPU, `cudnn` a kernel for NVIDIA GPUs in fp16 and bf16; `auto` picks by machine and
            precision. With attention dropout the plain one replaces cuDNN's.
        remat_policy: what gradient checkpointing keeps; `full` recomputes whole layers, the others
            are the policies of these names in jax.checkpoint_policies.
    """

    pretrained: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    freeze_feature_encoder: bool = True
    freeze_encoder_steps: int = 0
    trainable_layers: int | None = None
    reset_head: bool = False
    attention: Literal["auto", "xla", "pallas", "cudnn"] = "auto"
    remat_policy: Literal["full", "dots_saveable", "dots_with_no_batch_dims_saveable"] = "full"

    def __post_init__(self):
        for name in ("freeze_encoder_steps", "trainable_layers"):
            checks.at_least(f"model.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule, named as the Hugging Face Trainer names them.

    Attributes:
        learning_rate: the peak learning rate.
        head_learning_rate: another peak rate for the CTC head (lm_head), on the same schedule.
        lr_scheduler_type: the schedule after the warm-up; `tri_stage` holds, then decays.
        warmup_steps: updates in which the learning rate rises linearly from 0.
        warmup_fraction: the warm-up as a fraction of the run; excludes warmup_steps.
        hold_fraction: the fraction of the run that `tri_stage` stays at the peak.
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_epsilon: added to the root of the second moment.
        weight_decay: decoupled decay of weights, not of biases and LayerNorm scales.
        max_grad_norm: clip gradients to this global norm; null for no clipping.
        ema_decay: the decay of an exponential moving average of the weights, which is scored and
            exported instead of them; null for none.
    """

    learning_rate: float = 3e-4
    head_learning_rate: float | None = None
    lr_scheduler_type: Literal["linear", "constant", "cosine", "tri_stage"] = "linear"
    warmup_steps: int = 0
    warmup_fraction: float | None = None
    hold_fraction: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None

    def __post_init__(self):
        for name in ("learning_rate", "head_learning_rate"):
            checks.above(f"optim.{name}", getattr(self, name), 0)
        checks.at_least("optim.warmup_steps", self.warmup_steps, 0)
        for name in ("warmup_fraction", "hold_fraction"):
            checks.at_least(f"optim.{name}", getattr(self, name), 0)
        if self.warmup_steps and self.warmup_fraction is not None:
            raise errors.ConfigError(
                "optim.warmup_steps and optim.warmup_fraction exclude each other: remove one."
            )
        if self.hold_fraction and self.lr_scheduler_type != "tri_stage":
            raise errors.ConfigError(
                f"optim.hold_fraction is {self.hold_fraction}: only optim.lr_scheduler_type"
                " tri_stage holds its peak."
            )
        if (self.warmup_fraction or 0) + self.hold_fraction > 1:
            raise errors.ConfigError(
                f"optim.warmup_fraction {self.warmup_fraction or 0} and optim.hold_fraction"
                f" {self.hold_fraction} are more than the whole run together."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise errors.ConfigError(f"optim.ema_decay is {self.ema_decay}: it must be in (0, 1).")
        checks.above("optim.adam_epsilon", self.adam_epsilon, 0)
        checks.at_least("optim.weight_decay", self.weight_decay, 0)
        checks.above("optim.max_grad_norm", self.max_grad_norm, 0)
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise errors.ConfigError(f"optim.{name} is {value}: it must be in [0, 1).")

    def warmup_updates(self, updates: int) -> int:
        """Updates of the warm-up in a run of so many; a fraction rounds up, as in the Trainer."""
        if self.warmup_fraction is None:
            return self.warmup_steps
        return math.ceil(self.warmup_fraction * updates)


@dataclass(frozen=True)
class TrainConfig:
    """How long and in which batches, what is logged, scored and kept.

    Attributes:
        num_train_epochs: passes over the training clips.
        max_steps: length of the run in updates; overrides num_train_epochs.
        global_batch_size: clips in an update, over all devices.
        gradient_accumulation_steps: micro-batches in an update; excludes global_batch_size.
        per_device_train_batch_size: clips in a micro-batch on each device.
        per_device_eval_batch_size: clips that each device scores at once.
        mixed_precision: the precision of matrix products and activations.
        gradient_checkpointing: recompute activations in the backward pass.
        logging_steps: updates between two lines of the log.
        eval_steps: updates between two evaluations.
        save_steps: updates between two checkpoints.
        save_total_limit: how many of the latest checkpoints are kept, besides the best one.
        metric_for_best_model: which score of eval_splits chooses the best checkpoint.
        early_stopping_patience: end the run after this many evaluations without a better score.
        max_bad_updates: stop the run after this many non-finite updates in a row.
        compat: `hf-4.17` trains and scores as the Trainer and the speech recognition example of
            transformers 4.17 did (docs/compat.md).
        on_save_error: what to do if the run folder cannot be written (a full disk): stop, or
            continue and try again at the next save.
        zero_sharding: divide the optimiser state among the devices (ZeRO stage 1): the same
            training in less memory.
    """

    num_train_epochs: float = 3.0
    max_steps: int | None = None
    global_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    mixed_precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: bool = False
    logging_steps: int = 100
    eval_steps: int = 500
    save_steps: int = 500
    save_total_limit: int = 3
    metric_for_best_model: Literal["cer", "wer", "loss"] = "cer"
    early_stopping_patience: int | None = None
    max_bad_updates: int = 10
    compat: Literal["hf-4.17"] | None = None
    on_save_error: Literal["stop", "continue"] = "stop"
    zero_sharding: bool = False

    def __post_init__(self):
        checks.above("train.num_train_epochs", self.num_train_epochs, 0)
        for name in (
            "max_steps global_batch_size gradient_accumulation_steps per_device_train_batch_size"
            " per_device_eval_batch_size logging_steps eval_steps save_steps save_total_limit"
            " early_stopping_patience max_bad_updates"
        ).split():
            checks.at_least(f"train.{name}", getattr(self, name), 1)
        if self.global_batch_size and self.gradient_accumulation_steps:
            raise errors.ConfigError(
                "train.global_batch_size and train.gradient_accumulation_steps exclude each"
                " other: the second follows from the first. Remove one of them."
            )


@dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
        seed: the seed of everything random: batch order, dropout, masks, fresh weights.
        output_dir: the run folder, also gs://BUCKET/PATH.
    """

    seed: int = 42
    output_dir: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        checks.at_least("seed", self.seed, 0)
        checks.below("seed", self.seed, 2**32)  # jax leaves out further bits without a word
        for name, value in flat(self).items():
            if value == "":
                raise errors.ConfigError(f"{name} is empty: give it a value, or leave it out.")

    @property
    def normalization(self) -> str | tuple[str | dict[str, Any], ...] | None:
        """What `text.normalization` says, an empty list too; where it is null, the language."""
        given = self.text.normalization
        return self.data.language if given is None else given

    def require(self, *names: str) -> None:
        """Raises `ConfigError`, which names all of these dotted options that are null."""
        values = flat(self)
        checks.utf8({name: values[name] for name in _PLACES})
        if missing := [name for name in names if values[name] is None]:
            *others, last = missing
            named = f"{', '.join(others)} and {last} are" if others else f"{last} is"
            raise errors.ConfigError(
                f"{named} not set: write {'them' if others else 'it'} in the file of --config, or"
                f" give {' '.join(f'--{name} VALUE' for name in missing)}."
            )


_PLACES = {"output_dir", "data.source", "data.prepared_dir", "model.pretrained", "text.vocabulary"}
"""Where a leading ~ is the user's home; in a file no shell has seen to it."""


def option_types() -> dict[str, Any]:
    """Every option of the configuration as a dotted name, with its type."""
    return options.kinds(Config)


def load(path: str | os.PathLike | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration; what stands in `overrides` wins.

    Args:
        path: a YAML file, or None for the defaults.
        overrides: `--section.key value` or `--section.key=value`, as on a command line.

    Raises:
        ConfigError: names the file or option, the key and the nearest right name.
    """
    return build(yaml_file.read(path) if path is not None else {}, overrides, origin=path)


def build(
    values: Mapping[str, Any],
    overrides: Sequence[str] = (),
    origin: str | os.PathLike | None = None,
) -> Config:
    """A configuration from nested values (as `as_dict` gives them) and options."""
    kinds = option_types()
    found = options.flatten(values, kinds, f"{origin}: " if origin is not None else "")
    found = options.merged(found, options.parse(overrides, kinds), kinds)
    checked = {name: options.typed(name, value, kinds[name]) for name, value in found.items()}
    for name in _PLACES & checked.keys():
        if checked[name] is not None:
            checked[name] = os.path.expanduser(checked[name])
    return options.construct(Config, checked)


def as_dict(config: Config) -> dict[str, Any]:
    """Nested plain values; `build` gives the same configuration back."""
    return yaml_file.plain(dataclasses.asdict(config))


def flat(config: Config) -> dict[str, Any]:
    """Every option by its dotted name."""
    return options.flatten(as_dict(config), option_types())


def save(config: Config, path: str | os.PathLike) -> None:
    """Writes the configuration as YAML that `load` reads back equal."""
    Path(path).write_text(dump(config), encoding="utf-8")


def dump(config: Config) -> str:
    """The configuration as YAML."""
    return yaml_file.dump(as_dict(config))
