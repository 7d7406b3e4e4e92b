"""wav2vec 2.0 in flax.linen: all that transformers' Wav2Vec2Config describes except adapters.

The parameter tree has the names of the Flax class that transformers had; parameters are float32.
Oracle: transformers' PyTorch Wav2Vec2ForCTC, tests/models/test_wav2vec2.py.
"""

import functools
from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flax_asr import errors
from flax_asr.models import activations, feature_encoder, layers, transformer

Lengths = TypeVar("Lengths", int, np.ndarray, jax.Array)


_PROBABILITIES = (
    "hidden_dropout attention_dropout activation_dropout feat_proj_dropout final_dropout layerdrop"
    " mask_time_prob mask_feature_prob"
).split()
_COUNTS = (
    "hidden_size intermediate_size num_attention_heads num_conv_pos_embeddings"
    " num_conv_pos_embedding_groups vocab_size mask_time_length mask_feature_length"
).split()


class EncoderOutput(NamedTuple):
    """Output of the encoder; values in frames past a row's length are meaningless.

    `hidden_states` are the embeddings and the output of every layer, the last one after the final
    layer norm if the architecture has one; `attentions` are the weights before dropout, zero for a
    layer that layerdrop left out. Both are None unless asked for. With `keep_padding` the others
    can have more frames than `extract_features`.
    """

    last_hidden_state: Float[Array, "batch frames hidden"]
    extract_features: Float[Array, "batch unpadded channels"]
    hidden_states: transformer.HiddenStates | None
    attentions: transformer.Attentions | None


class CTCOutput(NamedTuple):
    """Logits, float32 whatever the compute dtype; the others as in `EncoderOutput`."""

    logits: Float[Array, "batch frames vocab"]
    hidden_states: transformer.HiddenStates | None
    attentions: transformer.Attentions | None


def frame_lengths(config: layers.Wav2Vec2Config, sample_lengths: Lengths) -> Lengths:
    """Number of frames for so many samples; for integers, numpy and jax arrays.

    Zero for a clip shorter than the convolutions' receptive field.
    Source: transformers' Wav2Vec2PreTrainedModel._get_feat_extract_output_lengths.
    """
    lengths = sample_lengths
    for taps, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        lengths = (lengths - taps) // stride + 1
    return lengths * (lengths > 0)


def check(config: layers.Wav2Vec2Config) -> None:
    """Refuses a configuration that these modules do not implement.

    Raises:
        ModelError: names the key of the configuration and what it can be.
    """

    def refuse(key: str, why: str) -> None:
        value = getattr(config, key)
        raise errors.ModelError(f"model configuration: {key}: {value!r} {why}")

    if config.model_type != "wav2vec2":
        refuse("model_type", "is another architecture; only 'wav2vec2' is supported")
    if config.feat_extract_norm not in ("layer", "group"):
        refuse("feat_extract_norm", "is neither 'layer' nor 'group'")
    if config.add_adapter:
        refuse("add_adapter", "adds convolutions after the encoder, which are not supported")
    if config.adapter_attn_dim is not None:
        why = "adds attention adapters (MMS), which are not supported: take a model without"
        refuse("adapter_attn_dim", f"{why} them, such as facebook/mms-300m")
    for key in _COUNTS:
        if getattr(config, key) is None or getattr(config, key) < 1:
            refuse(key, "is not positive")
    for key in ("num_hidden_layers", "layer_norm_eps", "mask_time_min_masks", "initializer_range"):
        if not getattr(config, key) >= 0:  # refuses NaN too
            refuse(key, "is not zero or more")
    for key in ("conv_dim", "conv_kernel", "conv_stride"):
        if any(size < 1 for size in getattr(config, key)):
            refuse(key, "has a size that is not positive")
    if config.hidden_size % config.num_attention_heads:
        refuse("num_attention_heads", f"does not divide hidden_size {config.hidden_size}")
    if config.hidden_size % config.num_conv_pos_embedding_groups:
        refuse("num_conv_pos_embedding_groups", f"does not divide hidden_size {config.hidden_size}")
    if not len(config.conv_dim) == len(config.conv_kernel) == len(config.conv_stride):
        refuse("conv_dim", "differs in length from conv_kernel or conv_stride")
    if config.num_feat_extract_layers != len(config.conv_dim):
        refuse("num_feat_extract_layers", f"is not the length of conv_dim {config.conv_dim}")
    for key in _PROBABILITIES:
        if not 0 <= getattr(config, key) <= 1:
            refuse(key, "is not a probability: it must be between 0 and 1")
    if config.mask_feature_prob > 0 and config.mask_feature_length > config.hidden_size:
        refuse("mask_feature_length", f"is more than hidden_size {config.hidden_size}")
    activations.activation(config.hidden_act, "hidden_act")
    activations.activation(config.feat_extract_activation, "feat_extract_activation")


class _FeatureProjection(nn.Module):
    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    deterministic: bool

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch frames channels"]
    ) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch frames channels"]]:
        config = self.config
        normalised = layers.layer_norm(self.dtype, "layer_norm", config.layer_norm_eps)(features)
        init = layers.uniform(config.conv_dim[-1] ** -0.5)
        projected = nn.Dense(
            config.hidden_size,
            dtype=self.dtype,
            precision=layers.precision(self.dtype),
            kernel_init=init,
            bias_init=init,
            name="projection",
        )(normalised)
        dropout = layers.Dropout(config.feat_proj_dropout, self.deterministic)
        return dropout(projected), normalised


class Wav2Vec2Module(nn.Module):
    """Feature encoder, feature projection and transformer.

    Attributes:
        config: a transformers.Wav2Vec2Config.
        dtype: the compute dtype: float32, bfloat16 or float16.
        remat_policy: one of layers.REMAT_POLICIES, applied to each layer.
        attention: one of attention.KINDS; "auto" picks the fastest that can compute the case.
        platform: the platform to compile for; None: jax's default.
    """

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype = jnp.float32
    remat_policy: str = "none"
    attention: str = "auto"
    platform: str | None = None

    @nn.compact
    def __call__(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Bool[Array, "batch samples"] | Int[Array, "batch samples"] | None = None,
        mask_time_indices: Bool[Array, "batch frames"] | None = None,
        mask_feature_indices: Bool[Array, "batch hidden"] | None = None,
        deterministic: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        freeze_feature_encoder: bool = False,
        keep_padding: bool = False,
    ) -> EncoderOutput:
        """Encodes a padded batch.

        Args:
            input_values: normalised audio, 16 kHz, padded at the end.
            attention_mask: true for real samples, which come first. None: all are real.
            mask_time_indices: frames that get the mask embedding, whether or not `deterministic`,
                as in transformers; ignored when config.apply_spec_augment is false.
            mask_feature_indices: likewise channels of the projected features that become zero.
            deterministic: no dropout and no layerdrop; otherwise a "dropout" key is needed.
            output_attentions: return every layer's attention weights.
            output_hidden_states: return the embeddings and every layer's output.
            freeze_feature_encoder: no gradient for the feature encoder.
            keep_padding: do not cut off the frames that the TPU's attention kernel adds at the end
                (`transformer.ROW_MULTIPLE`), which saves passes over memory.

        Raises:
            ModelError: the configuration or an attribute is not supported.
        """
        config = self.config
        check(config)
        platform = self.platform or layers.default_platform()
        features = feature_encoder.FeatureEncoder(
            config,
            self.dtype,
            self.remat_policy,
            freeze_feature_encoder,
            platform,
            name="feature_extractor",
        )(input_values)
        frame_mask = None
        if attention_mask is not None:
            lengths = frame_lengths(config, attention_mask.astype(jnp.int32).sum(axis=-1))
            frame_mask = jnp.arange(features.shape[1]) < lengths[:, None]

        project = _FeatureProjection(config, self.dtype, deterministic, name="feature_projection")
        x, normalised = project(features)
        embedding = self.param("masked_spec_embed", nn.initializers.uniform(1.0), (x.shape[-1],))
        if config.apply_spec_augment and mask_time_indices is not None:
            x = jnp.where(mask_time_indices[:, :, None], embedding.astype(x.dtype), x)
        if config.apply_spec_augment and mask_feature_indices is not None:
            x = jnp.where(mask_feature_indices[:, None, :], jnp.zeros_like(x), x)

        encoder = transformer.Encoder(
            config,
            self.dtype,
            deterministic,
            self.remat_policy,
            self.attention,
            platform,
            name="encoder",
        )
        hidden_states, attentions = encoder(x, frame_mask, output_attentions, keep_padding)
        return EncoderOutput(
            last_hidden_state=hidden_states[-1],
            extract_features=normalised,
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )


class Head(nn.Module):
    """A linear layer whose products are accumulated, and returned, in float32."""

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch frames hidden"]
    ) -> Float[Array, "batch frames vocab"]:
        shape = (x.shape[-1], self.config.vocab_size)
        init = nn.initializers.normal(self.config.initializer_range)
        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", nn.initializers.zeros, shape[1:])
        return _scores(x.astype(self.dtype), kernel.astype(self.dtype)) + bias


@jax.custom_vjp
def _scores(
    x: Float[Array, "batch frames hidden"], kernel: Float[Array, "hidden vocab"]
) -> Float[Array, "batch frames vocab"]:
    """The product in float32. Its gradients are bfloat16 products if the inputs are bfloat16: a TPU
    would round to that anyway, and they read half the bytes. float16 would lose small gradients."""
    return _product(x, kernel, jnp.float32)


def _product(x, kernel, dtype):
    return jax.lax.dot_general(
        x,
        kernel,
        (((2,), (0,)), ((), ())),
        precision=layers.precision(x.dtype),
        preferred_element_type=dtype,
    )


def _scores_backward(residuals, gradient):
    x, kernel = residuals
    dtype = jnp.float32
    if x.dtype == jnp.bfloat16:
        # Without the barrier XLA stores float32, and each product that reads it rounds again.
        dtype, gradient = x.dtype, jax.lax.optimization_barrier(gradient.astype(x.dtype))
    return jax.vjp(functools.partial(_product, dtype=dtype), x, kernel)[1](gradient)


_scores.defvjp(lambda x, kernel: (_scores(x, kernel), (x, kernel)), _scores_backward)


class Wav2Vec2ForCTCModule(nn.Module):
    """`Wav2Vec2Module` with a linear head over the vocabulary; attributes as there."""

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype = jnp.float32
    remat_policy: str = "none"
    attention: str = "auto"
    platform: str | None = None

    @nn.compact
    def __call__(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Bool[Array, "batch samples"] | Int[Array, "batch samples"] | None = None,
        mask_time_indices: Bool[Array, "batch frames"] | None = None,
        mask_feature_indices: Bool[Array, "batch hidden"] | None = None,
        deterministic: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        freeze_feature_encoder: bool = False,
        keep_padding: bool = False,
    ) -> CTCOutput:
        """Logits of a padded batch; arguments and errors as in `Wav2Vec2Module`."""
        encoder = Wav2Vec2Module(
            self.config,
            self.dtype,
            self.remat_policy,
            self.attention,
            self.platform,
            name="wav2vec2",
        )
        encoded = encoder(
            input_values,
            attention_mask,
            mask_time_indices,
            mask_feature_indices,
            deterministic,
            output_attentions,
            output_hidden_states,
            freeze_feature_encoder,
            keep_padding,
        )
        x = layers.Dropout(self.config.final_dropout, deterministic)(encoded.last_hidden_state)
        logits = Head(self.config, self.dtype, name="lm_head")(x)
        return CTCOutput(logits, encoded.hidden_states, encoded.attentions)
