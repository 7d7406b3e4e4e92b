"""What training starts from: a configuration and a parameter tree of numpy arrays.

Source: transformers 4.57, modeling_flax_utils.py.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array

from flax_asr import errors
from flax_asr.data import buckets
from flax_asr.models import configuration, convert, wav2vec2, weights

if TYPE_CHECKING:
    # At run time it is imported where it is used: transformers imports torch where it can.
    from transformers import Wav2Vec2Config

Tree = dict[str, Any]


_logger = logging.getLogger("flax_asr")


class Pretrained(NamedTuple):
    """A model to train or to run.

    `params` are float32 numpy arrays; `fresh_head` says that the head is random, `stored_head` that
    the weights have one.
    """

    config: "Wav2Vec2Config"
    params: Tree
    fresh_head: bool
    stored_head: bool


def load(
    folder: Path,
    *,
    head_vocab_size: int | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Pretrained:
    """The wav2vec 2.0 model of a folder, with a CTC head.

    Args:
        folder: holds config.json and weights in any form that `weights.read` takes.
        head_vocab_size: None keeps the stored head (where there is none, a fresh one for the
            configuration's vocabulary is made, and the log says so); a number makes a fresh head
            of so many tokens.
        config_overrides: fields of transformers.Wav2Vec2Config that replace the stored ones.
        seed: of a fresh head.

    Raises:
        ConfigError: an override that is not a field, or not of its type.
        ModelError: damaged, or not a wav2vec 2.0 model.
    """
    config = configuration.read(folder)
    configuration.override(config, dict(config_overrides or {}))
    if head_vocab_size is not None:
        config.vocab_size = head_vocab_size
    with errors.in_model(folder):
        wav2vec2.check(config)
    tensors = weights.read(folder)
    stored = convert.has_head(tensors)
    keep = head_vocab_size is None and stored
    params = with_head(tensors, config, seed, keep=keep, source=folder)
    return Pretrained(config, params, fresh_head=not keep, stored_head=stored)


def fresh(config: "Wav2Vec2Config", seed: int, *, head: bool = True) -> Tree:
    """Random parameters, numpy: the same for the same seed, with or without a CTC head."""
    modules = {True: wav2vec2.Wav2Vec2ForCTCModule, False: wav2vec2.Wav2Vec2Module}
    key = jax.random.key(seed)
    return jax.device_get(random(modules[head](config), key, shortest(config)))


def shortest(config: "Wav2Vec2Config") -> tuple[int, int]:
    """The shape of one row of the fewest samples that give a frame."""
    return (1, buckets.smallest_samples(1, config.conv_kernel, config.conv_stride))


def random(module: nn.Module, key: Array, input_shape: tuple[int, ...]) -> Tree:
    params_key, dropout_key = jax.random.split(key)
    keys = {"params": params_key, "dropout": dropout_key}
    # Lazy: the model is not run, and layers of equal shapes share what is compiled, where one
    # compiled function for all of a large model's parameters takes minutes.
    return module.lazy_init(keys, jax.ShapeDtypeStruct(input_shape, jnp.float32))["params"]


def with_head(
    tensors: weights.Tensors,
    config: "Wav2Vec2Config",
    seed: int,
    *,
    keep: bool,
    source: str | os.PathLike,
) -> Tree:
    if keep:
        return of_tensors(tensors, config, source, head=True)
    encoder = of_tensors(tensors, config, source, head=False)
    _logger.warning(
        "%s: %s; it gets a fresh CTC head for %d tokens, which must be trained.",
        source,
        "the stored head is not used" if convert.has_head(tensors) else "the model has no head",
        config.vocab_size,
    )
    shapes = convert.shapes(config, head=True)
    kernel, bias = (shapes["lm_head", leaf] for leaf in ("kernel", "bias"))
    # As torch's class starts: transformers, Wav2Vec2PreTrainedModel._init_weights.
    values = np.random.default_rng(seed).normal(0.0, config.initializer_range, kernel)
    return {
        "wav2vec2": encoder,
        "lm_head": {"kernel": values.astype(np.float32), "bias": np.zeros(bias, np.float32)},
    }


def of_tensors(
    tensors: weights.Tensors, config: "Wav2Vec2Config", source: str | os.PathLike, *, head: bool
) -> Tree:
    """`convert.params_from_torch`, of numbers only; errors say that it is about `source`."""
    with errors.in_model(source):
        params = convert.params_from_torch(tensors, config, head=head)
        for path, values in traverse_util.flatten_dict(params).items():
            # An infinity can be meant, as a bias that forbids a symbol.
            if np.isnan(values.min()):
                raise errors.ModelError(
                    f"the tensor {convert.torch_name(path)!r} holds NaN: the file is damaged, or"
                    " its training went wrong. Download or copy the model again."
                )
        return params
