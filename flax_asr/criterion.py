"""The training objective: the model with its head, and the loss of every clip of a batch."""

from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
from transformers import Wav2Vec2Config

from flax_asr import ctc
from flax_asr.models import masking, upper, wav2vec2


class Batch(NamedTuple):
    """A micro-batch on the devices: `loader.Batch`, field for field."""

    audio: Int[Array, "batch samples"]
    gains: Float[Array, " batch"]
    sample_lengths: Int[Array, " batch"]
    labels: Int[Array, "batch tokens"]
    label_lengths: Int[Array, " batch"]
    weights: Float[Array, " batch"]


class CachedBatch(NamedTuple):
    """A micro-batch of cached lower layers' output instead of audio: `loader.CachedBatch`."""

    hidden_state: Float[Array, "batch frames hidden"]
    sample_lengths: Int[Array, " batch"]
    labels: Int[Array, "batch tokens"]
    label_lengths: Int[Array, " batch"]
    weights: Float[Array, " batch"]


@flax.struct.dataclass
class Objective:
    """The model and how its inputs are made; static, the same for every call.

    Attributes:
        module: the linen module with the CTC head.
        config: its configuration.
        do_normalize: normalise every clip to zero mean and unit variance, as in pre-training.
        use_attention_mask: give the model an attention mask; encoders with group norm were
            pre-trained without.
        lower_layers: number of layers that a cached batch has passed; None: batches are audio.
    """

    module: nn.Module = flax.struct.field(pytree_node=False)
    config: Wav2Vec2Config = flax.struct.field(pytree_node=False)
    do_normalize: bool = flax.struct.field(pytree_node=False, default=True)
    use_attention_mask: bool = flax.struct.field(pytree_node=False, default=True)
    lower_layers: int | None = flax.struct.field(pytree_node=False, default=None)

    def on(self, platform: str) -> "Objective":
        """The objective for compilation for a platform, which need not be present."""
        return self.replace(module=self.module.clone(platform=platform))


def forward(
    objective: Objective, params: PyTree, batch: Batch | CachedBatch, key: Any
) -> tuple[Float[Array, " batch"], Float[Array, "batch frames vocab"], Int[Array, " batch"]]:
    """Losses, logits and real frames of a batch.

    With a key, dropout and SpecAugment are applied as in training, and the logits may end with a
    few frames of padding.
    """
    config = objective.config
    frame_lengths = wav2vec2.frame_lengths(config, batch.sample_lengths)
    logits_of = _logits_of_features if isinstance(batch, CachedBatch) else _logits_of_audio
    logits = logits_of(objective, params, batch, frame_lengths, key)
    losses = ctc.ctc_loss(
        logits, frame_lengths, batch.labels, batch.label_lengths, blank=config.pad_token_id
    )
    if config.ctc_loss_reduction == "mean":
        losses = losses / jnp.maximum(batch.label_lengths, 1)
    return losses, logits, frame_lengths


def lower(
    objective: Objective, params: dict[str, Array], batch: Batch
) -> Float[Array, "batch frames hidden"]:
    """The lower layers' output for every row, without dropout; see `CachedBatch`.

    Args:
        params: parameters by path.
    """
    audio, attention_mask = _model_inputs(objective, batch)
    tree = flax.traverse_util.unflatten_dict(params, sep="/")
    outputs = objective.module.apply(
        {"params": tree}, audio, attention_mask, output_hidden_states=True
    )
    return outputs.hidden_states[objective.lower_layers]


def waveform(batch: Batch, do_normalize: bool) -> Float[Array, "batch samples"]:
    """int16 and gain -> float32; padding is 0 and counts for nothing.

    Source: transformers' Wav2Vec2FeatureExtractor: (x - mean) / sqrt(variance + 1e-7), each clip
    before it is padded.
    """
    real = jnp.arange(batch.audio.shape[1]) < batch.sample_lengths[:, None]
    audio = jnp.where(real, batch.audio.astype(jnp.float32) * batch.gains[:, None], 0.0)
    if not do_normalize:
        return audio
    count = jnp.maximum(batch.sample_lengths, 1)[:, None].astype(jnp.float32)
    centred = jnp.where(real, audio - audio.sum(axis=1, keepdims=True) / count, 0.0)
    variance = jnp.square(centred).sum(axis=1, keepdims=True) / count
    return centred * jax.lax.rsqrt(variance + 1e-7)


def _model_inputs(
    objective: Objective, batch: Batch
) -> tuple[Float[Array, "batch samples"], Bool[Array, "batch samples"] | None]:
    """(Audio as the model takes it, its attention mask or None)."""
    audio = waveform(batch, objective.do_normalize)
    if not objective.use_attention_mask:
        return audio, None
    return audio, jnp.arange(audio.shape[1]) < batch.sample_lengths[:, None]


def _logits_of_audio(
    objective: Objective,
    params: PyTree,
    batch: Batch,
    frame_lengths: Int[Array, " batch"],
    key: Any,
) -> Float[Array, "batch frames vocab"]:
    """The whole model; with a key, masks and dropout are drawn."""
    config = objective.config
    audio, attention_mask = _model_inputs(objective, batch)
    time_mask = feature_mask = rngs = None
    if key is not None:
        dropout_key, time_key, feature_key = jax.random.split(key, 3)
        rngs = {"dropout": dropout_key}
        frames = int(wav2vec2.frame_lengths(config, audio.shape[1]))
        if not objective.use_attention_mask:  # the model sees all frames as real
            frame_lengths = jnp.full_like(frame_lengths, frames)
        time_mask, feature_mask = _masks(config, time_key, feature_key, frame_lengths, frames)
    return objective.module.apply(
        {"params": params},
        audio,
        attention_mask=attention_mask,
        mask_time_indices=time_mask,
        mask_feature_indices=feature_mask,
        deterministic=key is None,
        keep_padding=key is not None,
        rngs=rngs,
    ).logits


def _masks(
    config: Wav2Vec2Config,
    time_key: Any,
    feature_key: Any,
    frame_lengths: Int[Array, " batch"],
    frames: int,
) -> tuple[Bool[Array, "batch frames"] | None, Bool[Array, "batch hidden"] | None]:
    """SpecAugment's masks of frames and of channels; each None if the configuration has none."""
    time_mask = feature_mask = None
    if config.apply_spec_augment and config.mask_time_prob > 0:
        time_mask = masking.time_mask(
            time_key,
            frame_lengths,
            frames,
            prob=config.mask_time_prob,
            length=config.mask_time_length,
            min_spans=config.mask_time_min_masks,
        )
    if config.apply_spec_augment and config.mask_feature_prob > 0:
        feature_mask = masking.feature_mask(
            feature_key,
            len(frame_lengths),
            config.hidden_size,
            prob=config.mask_feature_prob,
            length=config.mask_feature_length,
            min_spans=config.mask_feature_min_masks,
        )
    return time_mask, feature_mask


def _logits_of_features(
    objective: Objective,
    params: PyTree,
    batch: CachedBatch,
    frame_lengths: Int[Array, " batch"],
    key: Any,
) -> Float[Array, "batch frames vocab"]:
    """The upper layers and the head, with the dropout that the whole model would draw."""
    frames = batch.hidden_state.shape[1]
    return upper.of(objective.module, objective.lower_layers).apply(
        {"params": params},
        batch.hidden_state,
        jnp.arange(frames) < frame_lengths[:, None],
        deterministic=key is None,
        rngs=None if key is None else {"dropout": jax.random.split(key, 3)[0]},
    )
