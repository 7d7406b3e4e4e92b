"""Multi-head self-attention over the frames of a clip."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flax_asr.models import layers


class SelfAttention(nn.Module):
    """Attention of every frame to the real frames, with the four projections around it.

    Scores come out of a matrix product in the compute dtype; their softmax is float32. A row
    without a real frame attends to all alike, which is finite and counts for nothing.
    """

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch frames hidden"],
        frame_mask: Bool[Array, "batch frames"] | None,
    ) -> tuple[
        Float[Array, "batch frames hidden"],
        Float[Array, "batch heads frames frames"],
    ]:
        hidden, heads = self.config.hidden_size, self.config.num_attention_heads
        precision = layers.precision(self.dtype)

        def project(name: str) -> Float[Array, "batch frames heads head"]:
            y = layers.dense(self.config, hidden, self.dtype, name)(x)
            return y.reshape(*y.shape[:-1], heads, hidden // heads)

        query = project("q_proj") * jnp.asarray((hidden // heads) ** -0.5, self.dtype)
        key, value = project("k_proj"), project("v_proj")
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision=precision)
        scores = scores.astype(jnp.float32)
        if frame_mask is not None:
            lowest = jnp.finfo(jnp.float32).min
            scores = jnp.where(frame_mask[:, None, None, :], scores, lowest)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        dropped = layers.Dropout(self.config.attention_dropout, self.deterministic)(weights)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", dropped, value, precision=precision)
        mixed = mixed.reshape(x.shape)
        return layers.dense(self.config, hidden, self.dtype, "out_proj")(mixed), weights
