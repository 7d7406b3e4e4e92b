"""SpecAugment's masks as pure functions of a key, distributed as in transformers.

Source: transformers.models.wav2vec2.modeling_wav2vec2._compute_mask_indices. One uniform epsilon
for the whole batch rounds the number of spans of each row; starts are drawn without replacement.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

AnyKey = Key[Array, ""] | UInt32[Array, "2"]


def time_mask(
    key: AnyKey,
    frame_lengths: Int[Array, " batch"],
    frames: int,
    *,
    prob: float,
    length: int,
    min_spans: int,
) -> Bool[Array, "batch frames"]:
    """Frames to replace by the mask embedding, True where masked.

    Args:
        key: equal keys give equal masks.
        frame_lengths: real frames of each row; spans lie within them.
        frames: frames of a row with padding.
        prob: share of the frames that spans would cover if none overlapped; 0 masks nothing.
        length: frames of a span, at least 1. A shorter row is not masked.
        min_spans: least number of spans in a row that has room for them.
    """
    if prob <= 0.0 or length > frames:
        return jnp.zeros((*frame_lengths.shape, frames), bool)
    epsilon_key, starts_key = jax.random.split(key)
    lengths = frame_lengths.astype(jnp.int32)
    expected = lengths.astype(jnp.float32) * (prob / length)
    whole = jnp.floor(expected)
    # floor(expected + epsilon), without the rounding error of that sum
    epsilon = jax.random.uniform(epsilon_key)
    spans = whole.astype(jnp.int32) + (epsilon >= 1.0 - (expected - whole)).astype(jnp.int32)
    places = lengths - (length - 1)
    spans = jnp.maximum(spans, min_spans)
    spans = jnp.minimum(spans, frames // length)
    spans = jnp.minimum(spans, jnp.maximum(places, 0))

    positions = jnp.arange(frames)
    draws = jax.random.uniform(starts_key, (*lengths.shape, frames))
    draws = jnp.where(positions < places[:, None], draws, 2.0)
    started = jnp.cumsum(_least(draws, spans), axis=-1)
    ended = jnp.pad(started, ((0, 0), (length, 0)))[:, :frames]
    return started > ended


def _least(draws: Float[Array, "batch n"], counts: Int[Array, " batch"]) -> Bool[Array, "batch n"]:
    """Which elements are the `counts` least of each row; of equal ones the first."""
    nth = jnp.maximum(counts - 1, 0)[:, None]
    greatest = jnp.take_along_axis(jnp.sort(draws, axis=-1, stable=False), nth, axis=-1)
    below, equal = draws < greatest, draws == greatest
    still = counts[:, None] - below.sum(axis=-1, keepdims=True)
    return below | (equal & (jnp.cumsum(equal, axis=-1) <= still))


def feature_mask(
    key: AnyKey, batch: int, features: int, *, prob: float, length: int, min_spans: int
) -> Bool[Array, "batch features"]:
    """Channels to set to zero, True where masked; arguments as in `time_mask`."""
    lengths = jnp.full((batch,), features, jnp.int32)
    return time_mask(key, lengths, features, prob=prob, length=length, min_spans=min_spans)
