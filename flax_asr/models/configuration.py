"""Model configurations, transformers' Wav2Vec2Config, as folders and users give them.

transformers is imported inside of functions: it imports torch where it can.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_asr import errors
from flax_asr.models import weights

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config


def read(folder: Path) -> "Wav2Vec2Config":
    """A folder's config.json.

    Raises:
        ModelError: there is none, or it is not one of wav2vec 2.0.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Wav2Vec2Config

    content = weights.read_config(folder)
    kind = content.get("model_type")
    if kind != Wav2Vec2Config.model_type:
        raise errors.ModelError(
            f"{folder} holds a model of type {kind!r}; only 'wav2vec2' is supported."
        )
    try:
        return Wav2Vec2Config(**content)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise errors.ModelError(f"{folder / 'config.json'}: {error}") from error


def override(config: "Wav2Vec2Config", changes: Mapping[str, Any]) -> None:
    """Sets fields of `config`.

    Raises:
        ConfigError: names the field, and the nearest one that exists.
    """
    from huggingface_hub.errors import StrictDataclassError

    changes = dict(changes)
    if "conv_dim" in changes and isinstance(changes["conv_dim"], (list, tuple)):
        # transformers stores the length too and refuses a configuration where they differ
        changes.setdefault("num_feat_extract_layers", len(changes["conv_dim"]))
    fields = config.to_dict()
    for name, value in changes.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise errors.ConfigError(
                f"model.config.{name} is not a field of transformers.Wav2Vec2Config.{hint}"
            )
        try:
            setattr(config, name, value)
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise errors.ConfigError(f"model.config.{name}: {value!r}: {error}") from error
