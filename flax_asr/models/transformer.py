"""The transformer of wav2vec 2.0: positional convolution, layers of attention and feed-forward."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flax_asr.models import activations, attention, layerdrop, layers, positional

HiddenStates = tuple[Float[Array, "batch frames hidden"], ...]
Attentions = tuple[Float[Array, "batch heads frames frames"], ...]
ROW_MULTIPLE = 8
"""The TPU's attention kernel needs frames padded to a multiple of this: whole tiles, so that clips
are contiguous in memory."""


class _FeedForward(nn.Module):
    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    deterministic: bool

    @nn.compact
    def __call__(self, x: Float[Array, "batch frames hidden"]) -> Array:
        config = self.config
        x = layers.dense(config, config.intermediate_size, self.dtype, "intermediate_dense")(x)
        x = activations.activation(config.hidden_act, "hidden_act")(x)
        x = layers.Dropout(config.activation_dropout, self.deterministic)(x)
        x = layers.dense(config, config.hidden_size, self.dtype, "output_dense")(x)
        return layers.Dropout(config.hidden_dropout, self.deterministic)(x)


class _EncoderLayer(nn.Module):
    """Attention and feed-forward, each with a residual; layer norms before them or after."""

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    deterministic: bool
    kind: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch frames hidden"],
        frame_mask: Bool[Array, "batch frames"] | None,
    ) -> tuple[
        Float[Array, "batch frames hidden"],
        Float[Array, "batch heads frames frames"] | None,
    ]:
        config, epsilon = self.config, self.config.layer_norm_eps
        attend = attention.SelfAttention(
            config, self.dtype, self.deterministic, self.kind, name="attention"
        )
        feed_forward = _FeedForward(config, self.dtype, self.deterministic, name="feed_forward")
        dropout = layers.Dropout(config.hidden_dropout, self.deterministic)

        if config.do_stable_layer_norm:
            normed, x = layers.norm_beside(self.dtype, "layer_norm", epsilon)(x)
            attended, weights = attend(normed, frame_mask)
            x = x + dropout(attended)
            normed, x = layers.norm_beside(self.dtype, "final_layer_norm", epsilon)(x)
            return x + feed_forward(normed), weights
        norm = layers.layer_norm(self.dtype, "layer_norm", epsilon)
        final_norm = layers.layer_norm(self.dtype, "final_layer_norm", epsilon)
        attended, weights = attend(x, frame_mask)
        x = norm(x + dropout(attended))
        return final_norm(x + feed_forward(x)), weights


@functools.cache
def _layer_class(remat_policy: str) -> type[nn.Module]:
    """The encoder layer as a function that JAX traces once for all layers that are alike.

    XLA puts its code in place of the calls, so that programs are those of plain layers.
    """
    return nn.jit(layers.rematerialised(_EncoderLayer, remat_policy))


class _Layers(nn.Module):
    """The layers from `first` on; each is skipped with probability `layerdrop` while training."""

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    deterministic: bool
    remat_policy: str
    kind: str
    platform: str
    first: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch frames hidden"],
        frame_mask: Bool[Array, "batch frames"] | None,
        keep_attentions: bool,
    ) -> tuple[HiddenStates, Attentions]:
        config = self.config
        layer_class = _layer_class(self.remat_policy)
        dropping = config.layerdrop > 0.0 and not self.deterministic and not self.is_initializing()
        hidden_states, attentions = [x], []
        for index in range(self.first, config.num_hidden_layers):

            def made(layer_class: type[nn.Module], name: str = str(index)) -> nn.Module:
                return layer_class(config, self.dtype, self.deterministic, self.kind, name=name)

            if dropping:
                x, weights = layerdrop.apply(
                    layer_class,
                    made,
                    jax.random.uniform(self.make_rng("dropout")) >= config.layerdrop,
                    x,
                    frame_mask,
                    heads=config.num_attention_heads,
                    keep_attentions=keep_attentions,
                    platform=self.platform,
                )
            else:
                x, weights = made(layer_class)(x, frame_mask)
            hidden_states.append(x)
            if keep_attentions:
                attentions.append(weights)
        return tuple(hidden_states), tuple(attentions)


class Encoder(nn.Module):
    """The transformer: from projected features, or from the output of its lower layers.

    Attributes:
        config, dtype, deterministic, remat_policy, attention: as of `Wav2Vec2Module`.
        platform: what it is compiled for.
        lower_layers: how many layers the input has passed, so that it is that one of
            `EncoderOutput.hidden_states`; None for projected features.
    """

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    deterministic: bool
    remat_policy: str
    attention: str
    platform: str
    lower_layers: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch unpadded hidden"],
        frame_mask: Bool[Array, "batch unpadded"] | None,
        keep_attentions: bool,
        keep_padding: bool = False,
    ) -> tuple[HiddenStates, Attentions]:
        config, frames = self.config, x.shape[1]
        norm = layers.layer_norm(self.dtype, "layer_norm", config.layer_norm_eps)
        kind = attention.choose(
            self.attention,
            self.platform,
            config,
            self.dtype,
            frames,
            deterministic=self.deterministic,
            keep_weights=keep_attentions,
            remat_policy=self.remat_policy,
        )
        if kind == "pallas":
            x, frame_mask = _in_whole_tiles(x, frame_mask)
        if self.lower_layers is None:
            if frame_mask is not None:
                x = jnp.where(frame_mask[:, :, None], x, jnp.zeros_like(x))
            embed = positional.PositionalConvEmbedding(config, self.dtype, name="pos_conv_embed")
            x = x + embed(x)
            if not config.do_stable_layer_norm:
                x = norm(x)
            x = layers.Dropout(config.hidden_dropout, self.deterministic)(x)
        stack = _Layers(
            config,
            self.dtype,
            self.deterministic,
            self.remat_policy,
            kind,
            self.platform,
            self.lower_layers or 0,
            name="layers",
        )
        hidden_states, attentions = stack(x, frame_mask, keep_attentions)
        if not keep_padding:
            hidden_states = tuple(states[:, :frames] for states in hidden_states)
        if config.do_stable_layer_norm and self.lower_layers != config.num_hidden_layers:
            hidden_states = (*hidden_states[:-1], norm(hidden_states[-1]))
        return hidden_states, attentions


def _in_whole_tiles(x, frame_mask):
    """Both with frames of padding added, so that a clip fills whole tiles of a TPU."""
    batch, frames, _ = x.shape
    more = -frames % ROW_MULTIPLE
    if more == 0:
        return x, frame_mask
    if frame_mask is None:
        frame_mask = jnp.ones((batch, frames), bool)
    return jnp.pad(x, ((0, 0), (0, more), (0, 0))), jnp.pad(frame_mask, ((0, 0), (0, more)))
