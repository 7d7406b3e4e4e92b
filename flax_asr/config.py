"""The configuration: frozen dataclasses, one for each concern, read strictly from YAML and options.

A key that does not exist, a value of the wrong type or out of range is a `ConfigError` that names
the key and the nearest right one. Scalars are YAML 1.2: `no` is a string, `1e-8` is a number.
"""

import dataclasses
import difflib
import inspect
import io
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flax_asr import errors


@dataclass(frozen=True)
class DataConfig:
    """Which recordings are used, and how they are cut into batches.

    Attributes:
        source: a release folder, its .tar.gz, `parquet:GLOB`, `hf:NAME[:CONFIG]`, or a
            .csv / .tsv / .jsonl manifest with the columns path and sentence.
        language: the code of the language as Common Voice writes it, for example zh-HK.
        train_splits: the splits trained on.
        eval_splits: scored during training; they choose the best checkpoint.
        test_splits: scored once, at the end, with the best checkpoint.
        prepared_dir: where decoded audio is kept; by default a folder beside output_dir.
        text_column: the column of the transcript, where it is not `sentence`.
        min_seconds: shorter clips are left out.
        max_seconds: longer clips are left out.
        num_buckets: the most shapes that batches may have.
        num_workers: decoding processes; by default one for each core.
        max_train_clips: use only so many training clips, drawn once from the seed.
        max_eval_clips: use only so many clips of every other split.
        trim_silence: cut silence from both ends of every clip.
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

    def __post_init__(self):
        _at_least("data.min_seconds", self.min_seconds, 0)
        _at_least("data.num_buckets", self.num_buckets, 1)
        for name in ("num_workers", "max_train_clips", "max_eval_clips"):
            _at_least(f"data.{name}", getattr(self, name), 1)
        if self.max_seconds <= self.min_seconds:
            raise errors.ConfigError(
                f"data.max_seconds is {self.max_seconds}: it must be larger than"
                f" data.min_seconds ({self.min_seconds})."
            )


@dataclass(frozen=True)
class TextConfig:
    """How transcripts become labels.

    Attributes:
        normalization: a language code or a list of steps; by default data.language's rules.
        min_count: rarer characters of the training text become [UNK].
        vocabulary: a vocab.json to use instead of the training text's characters.
    """

    normalization: str | tuple[str | dict[str, Any], ...] | None = None
    min_count: int = 1
    vocabulary: str | None = None

    def __post_init__(self):
        _at_least("text.min_count", self.min_count, 1)


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained, and which part of it.

    Attributes:
        pretrained: a hub id or a folder (a run folder too); null starts from random weights.
        config: overrides of fields of transformers.Wav2Vec2Config.
        freeze_feature_encoder: the convolutions get no gradient and no optimiser state.
        trainable_layers: train only the head and so many of the top layers.
        reset_head: start a fresh head although the vocabulary is the same.
        attention: which form of attention computes.
        remat_policy: what gradient checkpointing keeps; `full` recomputes whole layers.
    """

    pretrained: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    freeze_feature_encoder: bool = True
    trainable_layers: int | None = None
    reset_head: bool = False
    attention: Literal["auto", "xla"] = "auto"
    remat_policy: str = "full"

    def __post_init__(self):
        _at_least("model.trainable_layers", self.trainable_layers, 0)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule, named as the Hugging Face Trainer names them.

    Attributes:
        learning_rate: the peak rate.
        lr_scheduler_type: what happens after the warm-up.
        warmup_steps: updates in which the rate rises linearly from 0.
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_epsilon: added to the root of the second moment.
        weight_decay: decoupled decay of weights, not of biases and LayerNorm scales.
        max_grad_norm: gradients are scaled down to this global norm; null for never.
    """

    learning_rate: float = 3e-4
    lr_scheduler_type: Literal["linear", "constant", "cosine"] = "linear"
    warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0

    def __post_init__(self):
        _above("optim.learning_rate", self.learning_rate, 0)
        _at_least("optim.warmup_steps", self.warmup_steps, 0)
        _above("optim.adam_epsilon", self.adam_epsilon, 0)
        _at_least("optim.weight_decay", self.weight_decay, 0)
        _above("optim.max_grad_norm", self.max_grad_norm, 0)
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise errors.ConfigError(f"optim.{name} is {value}: it must be in [0, 1).")


@dataclass(frozen=True)
class TrainConfig:
    """How long and in which batches, what is logged, scored and kept.

    Attributes:
        num_train_epochs: passes over the training clips.
        max_steps: updates; takes the place of num_train_epochs.
        global_batch_size: clips an update, over all devices.
        gradient_accumulation_steps: micro-batches an update; excludes global_batch_size.
        per_device_train_batch_size: clips a device takes at once.
        per_device_eval_batch_size: the same when scoring.
        mixed_precision: the precision of matrix products and activations.
        gradient_checkpointing: recompute activations in the backward pass.
        logging_steps: updates between two lines of the log.
        eval_steps: updates between two evaluations.
        save_steps: updates between two checkpoints.
        save_total_limit: how many of the latest checkpoints are kept, besides the best one.
        metric_for_best_model: which score of eval_splits chooses the best checkpoint.
        max_bad_updates: so many non-finite updates in a row stop the run.
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
    max_bad_updates: int = 10

    def __post_init__(self):
        _above("train.num_train_epochs", self.num_train_epochs, 0)
        for name in (
            "max_steps global_batch_size gradient_accumulation_steps per_device_train_batch_size"
            " per_device_eval_batch_size logging_steps eval_steps save_steps save_total_limit"
            " max_bad_updates"
        ).split():
            _at_least(f"train.{name}", getattr(self, name), 1)
        if self.global_batch_size and self.gradient_accumulation_steps:
            raise errors.ConfigError(
                "train.global_batch_size and train.gradient_accumulation_steps exclude each"
                " other: the second follows from the first. Remove one of them."
            )


@dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
        seed: of the batch order, dropout, masks and fresh weights.
        output_dir: the run folder.
    """

    seed: int = 42
    output_dir: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        _at_least("seed", self.seed, 0)

    def require(self, *names: str) -> None:
        """Raises `ConfigError` where one of these dotted options is null."""
        for name in names:
            value = self
            for part in name.split("."):
                value = getattr(value, part)
            if value is None:
                raise errors.ConfigError(
                    f"{name} is not set: write it in the configuration file or give --{name} VALUE."
                )


TRAINER_NAMES = {
    "fp16": "train.mixed_precision fp16",
    "bf16": "train.mixed_precision bf16",
    "warmup_ratio": "optim.warmup_steps",
    "group_by_length": "data.num_buckets (batches are always grouped by length)",
    "report_to": "nothing: log.jsonl is always written, TensorBoard too where it is installed",
    "train_split_name": "data.train_splits",
    "eval_split_name": "data.eval_splits",
    "text_column_name": "data.text_column",
    "audio_column_name": "nothing: the column is found by its name, audio or path",
    "dataset_name": "data.source hf:NAME",
    "dataset_config_name": "data.source hf:NAME:CONFIG",
    "model_name_or_path": "model.pretrained",
    "freeze_feature_extractor": "model.freeze_feature_encoder",
    "max_duration_in_seconds": "data.max_seconds",
    "min_duration_in_seconds": "data.min_seconds",
    "max_train_samples": "data.max_train_clips",
    "max_eval_samples": "data.max_eval_clips",
    "preprocessing_num_workers": "data.num_workers",
    "dataloader_num_workers": "data.num_workers",
    "chars_to_ignore": "text.normalization",
    "overwrite_output_dir": "the option --restart of `flax-asr train`",
    "resume_from_checkpoint": "nothing: the same command goes on by itself",
    "evaluation_strategy": "train.eval_steps",
    "eval_strategy": "train.eval_steps",
    "save_strategy": "train.save_steps",
    "logging_strategy": "train.logging_steps",
    "train_batch_size": "train.per_device_train_batch_size",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "num_epochs": "train.num_train_epochs",
    "epochs": "train.num_train_epochs",
    "batch_size": "train.global_batch_size",
    "lr": "optim.learning_rate",
    **{
        name: f"model.config: {{{name}: VALUE}}"
        for name in (
            "mask_time_prob mask_time_length mask_feature_prob mask_feature_length layerdrop"
            " attention_dropout hidden_dropout activation_dropout feat_proj_dropout"
            " final_dropout ctc_loss_reduction"
        ).split()
    },
}
"""Names of the Hugging Face Trainer and its examples that are spelt otherwise here."""


def option_types() -> dict[str, Any]:
    """Every option of the configuration as a dotted name, with its type."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            found |= {f"{name}.{k}": v for k, v in typing.get_type_hints(kind).items()}
        else:
            found[name] = kind
    return found


def load(path: str | os.PathLike | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration; what stands in `overrides` wins.

    Args:
        path: a YAML file, or None for the defaults.
        overrides: `--section.key value` or `--section.key=value`, as on a command line.

    Raises:
        ConfigError: names the file or option, the key and the nearest right name.
    """
    return build(_read_yaml(path) if path is not None else {}, overrides, origin=path)


def build(
    values: Mapping[str, Any],
    overrides: Sequence[str] = (),
    origin: str | os.PathLike | None = None,
) -> Config:
    """A configuration from nested values (as `as_dict` gives them) and options."""
    flat = _flatten(values, f"{origin}: " if origin is not None else "")
    flat |= _parse_options(overrides)
    kinds = option_types()
    checked: dict[str, Any] = {}
    for name, value in flat.items():
        checked[name] = _typed(name, value, kinds[name])
    sections: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for name, value in checked.items():
        section, _, key = name.rpartition(".")
        if section:
            sections.setdefault(section, {})[key] = value
        else:
            top[name] = value
    section_kinds = typing.get_type_hints(Config)
    return Config(**top, **{name: section_kinds[name](**keys) for name, keys in sections.items()})


def as_dict(config: Config) -> dict[str, Any]:
    """Nested plain values; `build` gives the same configuration back."""
    return _plain(dataclasses.asdict(config))


def flat(config: Config) -> dict[str, Any]:
    """Every option by its dotted name."""
    return _flatten(as_dict(config), "")


def save(config: Config, path: str | os.PathLike) -> None:
    """Writes the configuration as YAML that `load` reads back equal."""
    Path(path).write_text(dump(config), encoding="utf-8")


def dump(config: Config) -> str:
    """The configuration as YAML."""
    out = io.StringIO()
    _yaml().dump(as_dict(config), out)
    return out.getvalue()


def _yaml():
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def _read_yaml(path: str | os.PathLike) -> Mapping[str, Any]:
    from ruamel.yaml.error import YAMLError

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise errors.ConfigError(f"cannot read the configuration {path}: {error}") from error
    try:
        values = _yaml().load(text)
    except YAMLError as error:
        raise errors.ConfigError(f"{path} is not valid YAML: {_first_lines(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise errors.ConfigError(f"{path}: expected `section:` lines, found {_kind(values)}.")
    return values


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(("To suppress", "http", "#")))


def _flatten(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Dotted names; an empty section means its defaults."""
    kinds = option_types()
    sections = {name.split(".")[0] for name in kinds if "." in name}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name not in sections:
            if name not in kinds:
                raise errors.ConfigError(where + unknown_name(str(name)))
            flat[name] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if f"{name}.{key}" not in kinds:
                    raise errors.ConfigError(where + unknown_name(f"{name}.{key}"))
                flat[f"{name}.{key}"] = item
        elif value is not None:
            raise errors.ConfigError(
                f"{where}{name} is a section: expected keys below it, found {_kind(value)}."
            )
    return flat


def options_help() -> str:
    """One line for every option: its name, its default and what it does."""
    lines = ["options of the configuration, each as --section.key VALUE:"]
    defaults = flat(Config())
    for section, kind in {"": Config, **_sections()}.items():
        documented = inspect.getdoc(kind).partition("Attributes:")[2].replace("\n        ", " ")
        for line in filter(None, map(str.strip, documented.splitlines())):
            key, _, meaning = line.partition(": ")
            name = f"{section}.{key}" if section else key
            default = defaults[name]
            lines.append(f"  --{name}  {meaning} [{'null' if default is None else default}]")
    return "\n".join(lines)


def _sections() -> dict[str, type]:
    kinds = typing.get_type_hints(Config)
    return {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}


def unknown_name(name: str) -> str:
    """The message for a name that is not an option, with the nearest one that is."""
    last = name.rpartition(".")[2].replace("-", "_")
    names = list(option_types())
    same = [known for known in names if known.rpartition(".")[2] == last]
    if same:
        return f"there is no option {name}: it is {' or '.join(same)}."
    if last in TRAINER_NAMES:
        return f"there is no option {name}: here it is {TRAINER_NAMES[last]}."
    lasts = {known.rpartition(".")[2]: known for known in names}
    near = difflib.get_close_matches(last, lasts, n=1, cutoff=0.6)
    if near:
        return f"there is no option {name}: did you mean {lasts[near[0]]}?"
    return f"there is no option {name}. The README lists all options."


def _parse_options(arguments: Sequence[str]) -> dict[str, Any]:
    """`--section.key value` pairs -> dotted names and YAML 1.2 values."""
    kinds = option_types()
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise errors.ConfigError(
                f"unexpected argument {word}: options are --section.key value."
            )
        name, equals, value = word[2:].partition("=")
        parent = name.rpartition(".")[0]
        inside_mapping = parent in kinds and kinds[parent] == dict[str, Any]
        if name not in kinds and not inside_mapping:
            raise errors.ConfigError(unknown_name(name))
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise errors.ConfigError(f"--{name} needs a value.")
            value = rest.pop(0)
        if inside_mapping:
            found.setdefault(parent, {})[name.rpartition(".")[2]] = _scalar(name, value)
        elif name in found:
            raise errors.ConfigError(f"--{name} is given twice.")
        else:
            found[name] = _option_value(name, value, kinds[name])
    return found


def _option_value(name: str, text: str, kind: Any) -> Any:
    members = _members(kind)
    if text == "null" and types.NoneType in members:
        return None
    lists = [m for m in members if typing.get_origin(m) is tuple]
    if lists and not text.startswith("["):
        if str not in members or "," in text:
            return [part.strip() for part in text.split(",") if part.strip()]
        return text
    if str in members and not lists:
        return text
    return _scalar(name, text)


def _scalar(name: str, text: str) -> Any:
    from ruamel.yaml.error import YAMLError

    try:
        return _yaml().load(text)
    except YAMLError as error:
        raise errors.ConfigError(f"--{name} {text}: {_first_lines(error)}") from error


def _members(kind: Any) -> tuple[Any, ...]:
    if isinstance(kind, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as the option's type: integers serve as floats, nothing else is converted."""
    import msgspec

    try:
        typed = msgspec.convert(value, kind, strict=True)
        if isinstance(typed, float) and not math.isfinite(typed):
            raise errors.ConfigError(f"{name} is {value}: it must be finite.")
        return typed
    except msgspec.ValidationError as error:
        choices = " or ".join(
            ", ".join(typing.get_args(m)) for m in _members(kind) if typing.get_origin(m) is Literal
        )
        wanted = f"one of {choices}" if choices else str(error).replace("`", "")
        raise errors.ConfigError(f"{name} is {value!r}: {wanted}.") from error


def _kind(value: Any) -> str:
    return {list: "a list", str: f"the text {value!r}"}.get(type(value), repr(value))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and value < least:
        raise errors.ConfigError(f"{name} is {value}: it must be at least {least}.")


def _above(name: str, value: float | None, bound: float) -> None:
    if value is not None and value <= bound:
        raise errors.ConfigError(f"{name} is {value}: it must be larger than {bound}.")
