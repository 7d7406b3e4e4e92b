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
    the weight file has one.
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
        head_vocab_size: tokens of a fresh head. None keeps the stored head; if there is none, a
            fresh one is made for the configuration's vocabulary, and the log says so.
        config_overrides: fields of transformers.Wav2Vec2Config that replace the stored ones.
        seed: the seed of a fresh head.

    Raises:
        ConfigError: an override is not a field, or of the wrong type.
        ModelError: the folder is damaged, or holds no wav2vec 2.0 model.
    """
    config = configuration.read(folder)
    configuration.override(config, dict(config_overrides or {}))
    if head_vocab_size is not None:
        config.vocab_size = head_vocab_size
    with errors.in_model(folder):
        wav2vec2.check(config)
    tensors = weights.read(folder)
    stored = convert.has_head(tensors)
    fresh_head = head_vocab_size is not None or not stored
    if fresh_head:
        params = with_fresh_head(tensors, config, seed, folder)
    else:
        params = from_tensors(tensors, config, folder, head=True)
    return Pretrained(config, params, fresh_head, stored_head=stored)


def fresh(config: "Wav2Vec2Config", seed: int, *, head: bool = True) -> Tree:
    """Random parameters, numpy, with or without a CTC head; equal seeds give equal values."""
    modules = {True: wav2vec2.Wav2Vec2ForCTCModule, False: wav2vec2.Wav2Vec2Module}
    key = jax.random.key(seed)
    return jax.device_get(random(modules[head](config), key, shortest(config)))


def shortest(config: "Wav2Vec2Config") -> tuple[int, int]:
    """The input shape [1, samples] with the fewest samples that give a frame."""
    return (1, buckets.smallest_samples(1, config.conv_kernel, config.conv_stride))


def random(module: nn.Module, key: Array, input_shape: tuple[int, ...]) -> Tree:
    """Random parameters of a module, as jax arrays."""
    params_key, dropout_key = jax.random.split(key)
    keys = {"params": params_key, "dropout": dropout_key}
    # lazy_init does not run the model, and layers of equal shapes share their compiled functions:
    # one function for all parameters of a large model takes minutes to compile.
    return module.lazy_init(keys, jax.ShapeDtypeStruct(input_shape, jnp.float32))["params"]


def with_fresh_head(
    tensors: weights.Tensors, config: "Wav2Vec2Config", seed: int, source: str | os.PathLike
) -> Tree:
    """The encoder in `tensors` with a random CTC head, which the log tells the user."""
    encoder = from_tensors(tensors, config, source, head=False)
    _logger.warning(
        "%s: %s; it gets a fresh CTC head for %d tokens, which must be trained.",
        source,
        "the stored head is not used" if convert.has_head(tensors) else "the model has no head",
        config.vocab_size,
    )
    shapes = convert.shapes(config, head=True)
    kernel, bias = (shapes["lm_head", leaf] for leaf in ("kernel", "bias"))
    # Initialised as in transformers' Wav2Vec2PreTrainedModel._init_weights.
    values = np.random.default_rng(seed).normal(0.0, config.initializer_range, kernel)
    return {
        "wav2vec2": encoder,
        "lm_head": {"kernel": values.astype(np.float32), "bias": np.zeros(bias, np.float32)},
    }


def from_tensors(
    tensors: weights.Tensors, config: "Wav2Vec2Config", source: str | os.PathLike, *, head: bool
) -> Tree:
    """`convert.params_from_torch`, which also refuses NaN; errors name `source`."""
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
