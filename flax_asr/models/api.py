"""The model classes for users, with the names and signatures that transformers 4.57 had.

transformers 5.0 removed them; their users change one import. No torch is needed.

Source: transformers 4.57, modeling_flax_utils.py and models/wav2vec2/modeling_flax_wav2vec2.py.
"""

import copy
import dataclasses
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array

from flax_asr import errors
from flax_asr.models import configuration, convert, hub, outputs, pretrained, wav2vec2, weights

if TYPE_CHECKING:
    # Imported in functions at run time: transformers imports torch if it is installed.
    from transformers import Wav2Vec2Config

_WITHOUT_EFFECT = frozenset(
    "force_download resume_download trust_remote_code _from_auto _from_pipeline".split()
)
"""Arguments of transformers' `from_pretrained` that are accepted and have no effect here."""


class _PretrainedModel:
    """Module, configuration and parameters in one object."""

    base_model_prefix = "wav2vec2"
    main_input_name = "input_values"
    framework = "flax"

    module_class: ClassVar[type[nn.Module]]
    output_class: ClassVar[type[outputs.Output]]
    has_head: ClassVar[bool]

    def __init__(
        self,
        config: "Wav2Vec2Config",
        input_shape: tuple[int, ...] = (1, 1024),
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        **module_options: Any,
    ):
        """A model with random weights, or without weights with `_do_init=False`.

        Args:
            config: the architecture.
            input_shape: shape of the audio to initialise with; parameters do not depend on it.
            seed: the seed of the random weights.
            dtype: the compute dtype; parameters are float32.
            _do_init: whether the object holds parameters; otherwise they are passed to each call.
            module_options: further attributes of the linen module, such as `remat_policy`.

        Raises:
            ModelError: the architecture is not supported.
            TypeError: `config` is not a Wav2Vec2Config, or an option is unknown.
        """
        _check_type(type(self), config)
        wav2vec2.check(config)
        _check_options(type(self), config, module_options)
        self._config = config
        self._module = self.module_class(config=config, dtype=dtype, **module_options)
        self.key = jax.random.PRNGKey(seed)
        self.dtype = dtype
        self.input_shape = input_shape
        self._is_initialized = _do_init
        self._params: pretrained.Tree | None = None
        if _do_init:
            self.params = self.init_weights(self.key, input_shape)

    @property
    def config(self) -> "Wav2Vec2Config":
        return self._config

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def params_shape_tree(self) -> pretrained.Tree:
        shapes = convert.shapes(self.config, head=self.has_head)
        return traverse_util.unflatten_dict(
            {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
        )

    @property
    def required_params(self) -> set[tuple[str, ...]]:
        return set(convert.shapes(self.config, head=self.has_head))

    @property
    def params(self) -> pretrained.Tree:
        if not self._is_initialized:
            raise ValueError(
                "`params` cannot be read from a model made with `_do_init=False`: keep the "
                "parameters outside of the model and pass them where they are needed."
            )
        return self._params

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        if not self._is_initialized:
            raise ValueError(
                "`params` cannot be set on a model made with `_do_init=False`: keep the "
                "parameters outside of the model."
            )
        tree = flax.core.unfreeze(params)
        missing = self.required_params - set(traverse_util.flatten_dict(tree))
        if missing:
            names = ", ".join(sorted("/".join(path) for path in missing))
            raise ValueError(f"Some parameters are missing from `params`: {names}")
        self._params = tree

    def init_weights(
        self, rng: Array, input_shape: tuple[int, ...], params: Mapping[str, Any] | None = None
    ) -> pretrained.Tree:
        """Random parameters; with `params`, only what is missing from them.

        Raises:
            ValueError: `input_shape` is not [batch samples], or too short for a frame.
        """
        _frames(self.config, "input_shape is", tuple(input_shape))
        random = pretrained.random(self.module, rng, input_shape)
        if params is None:
            return random
        given = traverse_util.flatten_dict(flax.core.unfreeze(params))
        return traverse_util.unflatten_dict(traverse_util.flatten_dict(random) | given)

    def __call__(
        self,
        input_values: Any,
        attention_mask: Any = None,
        mask_time_indices: Any = None,
        params: Mapping[str, Any] | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        freeze_feature_encoder: bool = False,
        return_dict: bool | None = None,
    ) -> Any:
        """Runs the model; also under jit and grad.

        Only reverse-mode gradients work (`jax.grad`, `jax.vjp`), not `jax.jvp`: dropout, attention
        and others define their own.

        Args:
            input_values: [batch samples] audio at 16 kHz, normalised, padded at the end.
            attention_mask: [batch samples], 1 for real samples; None: all are real.
            mask_time_indices: [batch frames], true for frames that get the mask embedding.
            params: the parameters; None: the model's own.
            dropout_rng: needed with `train` when a dropout of the configuration is above zero.
            train: apply dropout. Masks are never drawn here.
            output_attentions, output_hidden_states, return_dict: None: as in the configuration.
            freeze_feature_encoder: zero gradients for the feature encoder; the values are the same.

        Returns:
            A result with named values; with `return_dict=False` a tuple of those not None.

        Raises:
            ValueError: `input_values` is not [batch samples] or too short for a frame; or the shape
                of a mask is wrong.
        """
        config = self.config
        input_values = jnp.asarray(input_values, jnp.float32)
        frames = _frames(config, "input_values has the shape", input_values.shape)
        batch = input_values.shape[0]
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if return_dict is None:
            return_dict = config.return_dict
        if attention_mask is not None:
            attention_mask = jnp.asarray(attention_mask).astype(jnp.int32)
            _check_shape("attention_mask", attention_mask, input_values.shape, "samples")
        if mask_time_indices is not None:
            mask_time_indices = jnp.asarray(mask_time_indices).astype(bool)
            _check_shape("mask_time_indices", mask_time_indices, (batch, frames), "frames")
        if batch == 0:  # kernels do not take an empty batch
            input_values, attention_mask, mask_time_indices = jax.tree.map(
                lambda rows: jnp.zeros((1, rows.shape[1]), rows.dtype),
                (input_values, attention_mask, mask_time_indices),
            )
        result = self.module.apply(
            {"params": self.params if params is None else params},
            input_values,
            attention_mask,
            mask_time_indices,
            deterministic=not train,
            output_attentions=bool(output_attentions),
            output_hidden_states=bool(output_hidden_states),
            freeze_feature_encoder=freeze_feature_encoder,
            rngs={} if dropout_rng is None else {"dropout": dropout_rng},
        )
        if batch == 0:
            result = jax.tree.map(lambda rows: rows[:0], result)
        output = self.output_class(**result._asdict())
        return output if return_dict else output.to_tuple()

    def _get_feat_extract_output_lengths(
        self, input_lengths: Any, add_adapter: bool | None = None
    ) -> Any:
        """Number of frames for so many samples, integers or arrays; there are no adapters."""
        del add_adapter
        if getattr(input_lengths, "dtype", np.dtype(int)).kind == "u":
            # For example the sum of a uint8 mask: a clip too short for a frame must go below zero.
            input_lengths = input_lengths.astype(np.int32)
        return wav2vec2.frame_lengths(self.config, input_lengths)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        dtype: Any = jnp.float32,
        *,
        config: "Wav2Vec2Config | str | os.PathLike | None" = None,
        cache_dir: str | os.PathLike | None = None,
        ignore_mismatched_sizes: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        from_pt: bool = False,
        _do_init: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> Any:
        """The model of a folder or of the Hugging Face hub, whatever form its weights have.

        A checkpoint without a head gets a fresh one, and the logger `flax_asr` says so.

        Args:
            pretrained_model_name_or_path: the folder or the hub id.
            dtype: the compute dtype; parameters are float32.
            config: an object or a folder, used instead of the stored configuration.
            cache_dir, local_files_only, token, revision: as for `hub.resolve`.
            ignore_mismatched_sizes: a stored head whose size is not the configuration's vocabulary
                is replaced by a fresh one instead of being refused.
            from_pt: accepted; the form of the weights is recognised in any case.
            _do_init: False returns (model, params), with the parameters outside the model.
            seed: the seed of a fresh head.
            options: fields of the configuration to change; others, such as `input_shape`, go to the
                class. `force_download`, `resume_download` and `trust_remote_code` are accepted
                without effect; `use_auth_token` is the old name of `token`.

        Raises:
            ModelError: the model is not found, damaged, or not wav2vec 2.0.
        """
        del from_pt
        options = {name: value for name, value in options.items() if name not in _WITHOUT_EFFECT}
        token = options.pop("use_auth_token", token)
        folder, _ = hub.resolve(
            pretrained_model_name_or_path, revision, cache_dir, local_files_only, token
        )
        if config is None or isinstance(config, (str, os.PathLike)):
            place = config or folder
            config = configuration.read(
                hub.resolve(place, None, cache_dir, local_files_only, token)[0]
            )
            fields = config.to_dict()
            configuration.override(
                config, {name: options.pop(name) for name in list(options) if name in fields}
            )
        source = pretrained_model_name_or_path
        with errors.in_model(source):
            model = cls(config, seed=seed, dtype=dtype, _do_init=False, **options)
        tensors = weights.read(folder)
        keeps_head = convert.has_head(tensors) and (
            not ignore_mismatched_sizes or len(tensors["lm_head.weight"]) == config.vocab_size
        )
        if cls.has_head and not keeps_head:
            params = pretrained.with_fresh_head(tensors, config, seed, source)
        else:
            params = pretrained.from_tensors(tensors, config, source, head=cls.has_head)
        if not _do_init:
            return model, params
        model._is_initialized = True
        model.params = jax.tree.map(jnp.asarray, params)
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        params: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        token: str | bool | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Writes config.json and model.safetensors, which PyTorch's class of this name loads.

        Args:
            save_directory: the folder.
            params: what is written, in the types that they have; None: the model's own.
            push_to_hub: refused where true: the folder is what `hf upload` takes.
            max_shard_size, token, safe_serialization: accepted; it is one file of safetensors.

        Raises:
            ModelError: the folder cannot be written, or `params` do not fit the configuration.
        """
        del max_shard_size, token, safe_serialization
        if push_to_hub:
            raise errors.ModelError(
                "save_pretrained does not upload: leave push_to_hub out, then run `hf upload"
                f" NAME {save_directory}`."
            )
        tree = flax.core.unfreeze(self.params if params is None else params)
        stored = copy.deepcopy(self.config)
        stored.architectures = [type(self).__name__.removeprefix("Flax")]
        tensors = convert.torch_from_params(tree, stored)
        # transformers loads a model in the type that is named here.
        types = {tensor.dtype.name for tensor in tensors.values()}
        stored.dtype = types.pop() if len(types) == 1 else "float32"
        weights.write(save_directory, tensors)
        configuration.write(Path(save_directory), stored)

    def to_bf16(self, params: Mapping[str, Any], mask: Any = None) -> pretrained.Tree:
        """`params` in bfloat16, where `mask` (a tree of booleans) is true."""
        return _cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Mapping[str, Any], mask: Any = None) -> pretrained.Tree:
        """`params` in float16, where `mask` (a tree of booleans) is true."""
        return _cast(params, jnp.float16, mask)

    def to_fp32(self, params: Mapping[str, Any], mask: Any = None) -> pretrained.Tree:
        """`params` in float32, where `mask` (a tree of booleans) is true."""
        return _cast(params, jnp.float32, mask)


def _frames(config: "Wav2Vec2Config", what: str, shape: tuple[Any, ...]) -> Any:
    frames = len(shape) == 2 and wav2vec2.frame_lengths(config, shape[1])
    if not frames:
        least = pretrained.shortest(config)[1]
        raise ValueError(
            f"{what} {shape}: it must be [batch samples], with {least} samples or more (a frame)."
        )
    return frames


def _check_shape(name: str, mask: Array, shape: tuple[Any, ...], unit: str) -> None:
    if mask.shape != shape:
        raise ValueError(f"{name} has the shape {mask.shape}: it must be [batch {unit}], {shape}.")


def _check_type(model: type, config: Any) -> None:
    from transformers import Wav2Vec2Config

    if not isinstance(config, Wav2Vec2Config):
        raise TypeError(
            f"{model.__name__}: the configuration is {config!r:.60}: it must be a"
            " transformers.Wav2Vec2Config. A model that has weights, in a folder or on the hub, is"
            f" {model.__name__}.from_pretrained(NAME)."
        )


def _check_options(model: type, config: "Wav2Vec2Config", options: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(model.module_class) if field.init]
    for name in options:
        if name not in known or name in ("parent", "name"):
            fields = config.to_dict()
            near = difflib.get_close_matches(name, [*known, *fields], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            if name in fields:
                hint = f" It is a field of the configuration: set config.{name}."
            raise TypeError(f"{model.__name__} has no option {name!r}.{hint}")


def _cast(params: Mapping[str, Any], dtype: Any, mask: Any) -> pretrained.Tree:
    params, mask = flax.core.unfreeze(params), flax.core.unfreeze(mask)
    if mask is None:
        mask = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating), params)
    return jax.tree.map(lambda leaf, chosen: leaf.astype(dtype) if chosen else leaf, params, mask)


class FlaxWav2Vec2Model(_PretrainedModel):
    """wav2vec 2.0 without a head: `.last_hidden_state`, `.extract_features`."""

    module_class = wav2vec2.Wav2Vec2Module
    output_class = outputs.FlaxWav2Vec2BaseModelOutput
    has_head = False


class FlaxWav2Vec2ForCTC(_PretrainedModel):
    """wav2vec 2.0 with a linear head over the vocabulary: `.logits`."""

    module_class = wav2vec2.Wav2Vec2ForCTCModule
    output_class = outputs.FlaxCausalLMOutput
    has_head = True
