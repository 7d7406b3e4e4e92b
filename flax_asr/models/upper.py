"""The upper layers and the head alone, which start from the cached output of the layers below.

Parameters and dropout keys have the names of `wav2vec2.Wav2Vec2ForCTCModule`, so the whole model's
parameter tree serves both. Oracle: the whole model,
tests/models/test_upper.py.
"""

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from flax_asr.models import layers, transformer, wav2vec2


class UpperForCTCModule(nn.Module):
    """`Wav2Vec2ForCTCModule` above one of its hidden states.

    Attributes:
        config, dtype, remat_policy, attention, platform: as in the whole model.
        lower_layers: number of layers that the hidden state has passed.
    """

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    remat_policy: str
    attention: str
    platform: str | None
    lower_layers: int

    @nn.compact
    def __call__(
        self,
        hidden_state: Float[Array, "batch frames hidden"],
        frame_mask: Bool[Array, "batch frames"],
        deterministic: bool = True,
    ) -> Float[Array, "batch frames vocab"]:
        """Logits, float32.

        Args:
            hidden_state: `hidden_states[lower_layers]` of the whole model; anything finite in
                frames of padding.
            frame_mask: true for real frames, which come first.
            deterministic: no dropout and no layerdrop; otherwise a "dropout" key is needed.
        """
        upper = _Upper(
            self.config,
            self.dtype,
            self.remat_policy,
            self.attention,
            self.platform,
            self.lower_layers,
            deterministic,
            name="wav2vec2",
        )
        x = upper(hidden_state, frame_mask)
        x = layers.Dropout(self.config.final_dropout, deterministic)(x)
        return wav2vec2.Head(self.config, self.dtype, name="lm_head")(x)


class _Upper(nn.Module):
    """The part of `Wav2Vec2Module` above the hidden state."""

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    remat_policy: str
    attention: str
    platform: str | None
    lower_layers: int
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        hidden_state: Float[Array, "batch frames hidden"],
        frame_mask: Bool[Array, "batch frames"],
    ) -> Float[Array, "batch frames hidden"]:
        encoder = transformer.Encoder(
            self.config,
            self.dtype,
            self.deterministic,
            self.remat_policy,
            self.attention,
            self.platform or layers.default_platform(),
            self.lower_layers,
            name="encoder",
        )
        hidden_states, _ = encoder(hidden_state, frame_mask, False)
        return hidden_states[-1]


def of(whole: wav2vec2.Wav2Vec2ForCTCModule, lower_layers: int) -> UpperForCTCModule:
    """The upper part of a model, above so many of its layers."""
    return UpperForCTCModule(
        whole.config,
        whole.dtype,
        whole.remat_policy,
        whole.attention,
        whole.platform,
        lower_layers,
    )
