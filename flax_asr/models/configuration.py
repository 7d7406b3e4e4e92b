"""Model configurations (transformers' Wav2Vec2Config), read from folders and changed by users.

transformers is imported inside functions: it imports torch if it is installed.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_asr import atomic, errors, json_object

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config


_FILE = "config.json"

# Keys for PyTorch's loader (types, kernels, remote code): without meaning here, and they would be
# copied into the export.
_NOT_OURS = frozenset(
    "dtype torch_dtype quantization_config auto_map custom_pipelines num_labels id2label label2id"
    " attn_implementation _attn_implementation _attn_implementation_internal"
    " experts_implementation _experts_implementation rope_scaling rope_parameters".split()
)
_MOST_LAYERS = 1000
_LARGEST = 2**24  # of every other whole number


def read(folder: Path) -> "Wav2Vec2Config":
    """A folder's config.json, without the keys for PyTorch's loader.

    Raises:
        ModelError: there is none, it is not of a wav2vec 2.0 model, or its sizes are absurd.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Wav2Vec2Config

    path = folder / _FILE
    content = json_object.read(path)
    if content is None:
        export = folder / "export"
        there = f" Its model is in {export}." if (export / _FILE).is_file() else ""
        raise errors.ModelError(f"{folder} has no {_FILE}: it is not a model's folder.{there}")
    kind = content.get("model_type")
    if kind != Wav2Vec2Config.model_type:
        raise errors.ModelError(
            f"{folder} holds a model of type {kind!r}; only 'wav2vec2' is supported."
        )
    content = {key: value for key, value in content.items() if key not in _NOT_OURS}
    for key, value in content.items():
        # Checked before anything of such a size is allocated.
        for size in value if isinstance(value, list) else [value]:
            most = _MOST_LAYERS if key == "num_hidden_layers" else _LARGEST
            if isinstance(size, int) and abs(size) > most:
                raise errors.ModelError(f"{path}: {key} is {size!r:.40}.")
    try:
        return Wav2Vec2Config(**content)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise errors.ModelError(f"{path}: {error}") from error


def write(folder: Path, config: "Wav2Vec2Config") -> None:
    """Writes config.json with every field, whole or not at all.

    Raises:
        ModelError: the folder cannot be written.
    """
    path = folder / _FILE
    try:
        with atomic.replacing(path, shared=True) as unfinished:
            unfinished.write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    except OSError as error:
        raise errors.ModelError(f"{path} cannot be written: {error}.") from error


def override(config: "Wav2Vec2Config", changes: Mapping[str, Any]) -> None:
    """Sets fields of `config`.

    Raises:
        ConfigError: names the field, and the nearest one that exists.
    """
    from huggingface_hub.errors import StrictDataclassError

    changes = dict(changes)
    if "conv_dim" in changes and isinstance(changes["conv_dim"], (list, tuple)):
        # transformers also stores the length, and refuses a configuration where they differ.
        changes.setdefault("num_feat_extract_layers", len(changes["conv_dim"]))
    fields = config.to_dict()
    for name, value in changes.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise errors.ConfigError(
                f"model.config.{name} is not a field of transformers.Wav2Vec2Config.{hint}"
            )
        if name == "ctc_loss_reduction" and value not in ("mean", "sum"):
            raise errors.ConfigError(f"model.config.{name}: {value!r} is neither 'mean' nor 'sum'.")
        try:
            setattr(config, name, value)
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise errors.ConfigError(f"model.config.{name}: {value!r}: {error}") from error
