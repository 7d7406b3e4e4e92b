"""Multi-head self-attention over the frames of a clip, in several implementations."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flax_asr import errors
from flax_asr.models import layers, short_attention

KINDS = ("auto", "xla", "pallas", "cudnn")
"""The plain form; our kernel for TPU; cuDNN's for NVIDIA GPUs; "auto" picks one of them."""

_GPUS = ("gpu", "cuda", "rocm")
_CUDNN_LARGEST_HEAD = 128
_CUDNN_OLDEST_GPU = 8.0


def choose(
    kind: str,
    platform: str,
    config: layers.Wav2Vec2Config,
    dtype: layers.Dtype,
    frames: int,
    *,
    deterministic: bool,
    keep_weights: bool,
    remat_policy: str,
) -> str:
    """The implementation to use: "xla", "pallas", "cudnn" or "recomputed".

    Only the plain form returns its weights, and cuDNN's form has no dropout: where either is
    needed, the plain form is used whatever `kind` says. On a GPU that is "recomputed", the plain
    form that does not keep its weights for the backward pass (two thirds of a layer's memory),
    unless the weights are asked for or a remat policy decides what is kept.

    Args:
        kind: one of KINDS.
        platform: "tpu", "gpu", "cuda", "rocm" or "cpu".
        config: the model's configuration.
        dtype: the compute dtype.
        frames: frames in a clip, padding included.
        deterministic: no dropout.
        keep_weights: whether the attention weights are asked for.
        remat_policy: what is kept for the backward pass, one of layers.REMAT_POLICIES.

    Raises:
        ModelError: the kind is unknown, or cannot compute this model on this platform.
    """
    if kind not in KINDS:
        raise errors.ModelError(f"model.attention: {kind!r} is not one of {', '.join(KINDS)}")
    hindrances = {
        "pallas": _pallas_hindrance(platform, dtype, frames),
        "cudnn": _cudnn_hindrance(platform, dtype, config),
    }
    if hindrances.get(kind):
        raise errors.ModelError(f"model.attention: {kind!r} {hindrances[kind]}; use 'auto'")
    if kind == "auto":
        kind = "pallas" if platform == "tpu" else "cudnn"
    drops = config.attention_dropout > 0.0 and not deterministic
    if hindrances.get(kind) or keep_weights or (drops and kind == "cudnn"):
        kind = "xla"
    recomputes = platform in _GPUS and remat_policy == "none" and not keep_weights
    return "recomputed" if kind == "xla" and recomputes else kind


def _pallas_hindrance(platform: str, dtype: layers.Dtype, frames: int) -> str | None:
    if platform not in ("tpu", "cpu"):
        return f"runs on TPU (and, slowly, on CPU), not on {platform}"
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"computes in float32 and bfloat16, not in {jnp.dtype(dtype)}"
    longest = short_attention.LONGEST_FRAMES[jnp.dtype(dtype).itemsize]
    if frames > longest:
        return f"takes at most {longest} frames a clip in {jnp.dtype(dtype)}, not {frames}"
    return None


def _cudnn_hindrance(
    platform: str, dtype: layers.Dtype, config: layers.Wav2Vec2Config
) -> str | None:
    if platform not in ("gpu", "cuda"):
        return f"runs on NVIDIA GPUs, not on {platform}"
    if jnp.dtype(dtype) not in (jnp.float16, jnp.bfloat16):
        return f"computes in float16 and bfloat16, not in {jnp.dtype(dtype)}"
    if jax.default_backend() == "gpu" and _compute_capability() < _CUDNN_OLDEST_GPU:
        return "needs an NVIDIA GPU of compute capability 8.0 or more"
    head = config.hidden_size // config.num_attention_heads
    if head % 8 or head > _CUDNN_LARGEST_HEAD:
        return f"takes heads of 8, 16, ... {_CUDNN_LARGEST_HEAD} channels, not of {head}"
    return None


def _compute_capability() -> float:
    """Compute capability of the NVIDIA GPU; 0 for AMD's, where JAX gives a name like "gfx942"."""
    try:
        return float(jax.local_devices(backend="gpu")[0].compute_capability)
    except ValueError:
        return 0.0


class SelfAttention(nn.Module):
    """Attention of every frame to the real frames, with the four projections around it.

    Scores are a matrix product in the compute dtype; their softmax is float32. A row without real
    frames attends to all frames equally: finite values that count for nothing.

    Attributes:
        config: the model's configuration.
        dtype: the compute dtype.
        deterministic: no dropout.
        kind: the implementation, as `choose` returns it.
    """

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    deterministic: bool
    kind: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch frames hidden"],
        frame_mask: Bool[Array, "batch frames"] | None,
    ) -> tuple[
        Float[Array, "batch frames hidden"],
        Float[Array, "batch heads frames frames"] | None,
    ]:
        """(output, weights before dropout if `kind` is "xla", else None)."""
        hidden, heads = self.config.hidden_size, self.config.num_attention_heads
        products, biases = zip(
            *(
                layers.Projection(self.config, hidden, self.dtype, name=name)(x)
                for name in ("q_proj", "k_proj", "v_proj")
            ),
            strict=True,
        )
        weights = None
        dropout = layers.Dropout(self.config.attention_dropout, self.deterministic)
        words = dropout.words() if dropout.is_on else None
        if self.kind == "pallas":
            mixed = short_attention.attend(
                products, biases, _lengths(x, frame_mask), heads, words, dropout.rate
            )
        else:
            query, key, value = (
                product + bias.astype(self.dtype)
                for product, bias in zip(products, biases, strict=True)
            )
            query = query * jnp.asarray((hidden // heads) ** -0.5, self.dtype)
            if self.kind == "cudnn":
                mixed = cudnn(query, key, value, frame_mask, heads)
            elif self.kind == "recomputed":
                mixed = recomputed(query, key, value, frame_mask, heads, words, dropout.rate)
            else:
                mixed, weights = plain(query, key, value, frame_mask, heads, words, dropout.rate)
        return layers.dense(self.config, hidden, self.dtype, "out_proj")(mixed), weights


def plain(query, key, value, frame_mask, heads, words=None, rate=0.0):
    """Attention in XLA's own operations: (weighted sums of values, weights before dropout).

    `words`, the two key words of `layers.dropped`, turn on dropout of the weights at `rate`.
    """
    scores = _masked(_by_head("bqhd,bkhd->bhqk", heads, query, key), frame_mask)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    kept = weights if words is None else layers.dropped(weights, words, rate)
    return _by_head("bhqk,bkhd->bqhd", heads, kept, value), weights


def _by_head(products, heads, *operands):
    """A matrix product for each head; frames [batch frames hidden] are split and joined again."""

    def split(x):
        return x if x.ndim == 4 else x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)

    exact = layers.precision(operands[0].dtype)
    found = jnp.einsum(products, *map(split, operands), precision=exact)
    return found if products.endswith("k") else found.reshape(*found.shape[:2], -1)


def _masked(scores, frame_mask):
    """Scores in float32, the lowest possible where the key is a frame of padding."""
    scores = scores.astype(jnp.float32)
    if frame_mask is None:
        return scores
    return jnp.where(frame_mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 6))
def recomputed(query, key, value, frame_mask, heads, words=None, rate=0.0):
    """The weighted sums of `plain`; the backward pass computes the weights again."""
    return plain(query, key, value, frame_mask, heads, words, rate)[0]


def _recomputed_forward(query, key, value, frame_mask, heads, words, rate):
    mixed = recomputed(query, key, value, frame_mask, heads, words, rate)
    return mixed, (query, key, value, frame_mask, words)


def _recomputed_backward(heads, rate, residuals, gradient):
    *inputs, frame_mask, words = residuals
    # Behind the barrier XLA cannot see that these are the weights of the forward pass.
    query, key, value = jax.lax.optimization_barrier(inputs)
    scores = _masked(_by_head("bqhd,bkhd->bhqk", heads, query, key), frame_mask)
    weight_gradient = _by_head("bqhd,bkhd->bhqk", heads, gradient, value)
    if words is not None:
        weight_gradient = layers.dropped(weight_gradient, words, rate)
    weight_gradient = weight_gradient.astype(jnp.float32)

    # Three passes over the scores: their maximum, two sums, and the results. The barriers keep XLA
    # from storing float32 scores from one pass for the next.
    largest = jax.lax.optimization_barrier(scores.max(axis=-1, keepdims=True))
    powers = jnp.exp(scores - largest)
    sums = powers.sum(axis=-1, keepdims=True), (powers * weight_gradient).sum(-1, keepdims=True)
    total, shift = jax.lax.optimization_barrier(sums)
    weights = powers / total
    score_gradient = weights * (weight_gradient - shift / total)
    if frame_mask is not None:
        score_gradient = jnp.where(frame_mask[:, None, None, :], score_gradient, 0.0)
    score_gradient = score_gradient.astype(query.dtype)
    kept = weights.astype(query.dtype)
    if words is not None:
        kept = layers.dropped(kept, words, rate)
    return (
        _by_head("bhqk,bkhd->bqhd", heads, score_gradient, key),
        _by_head("bhqk,bqhd->bkhd", heads, score_gradient, query),
        _by_head("bhqk,bqhd->bkhd", heads, kept, gradient),
        None,
        None,
    )


recomputed.defvjp(_recomputed_forward, _recomputed_backward)


def cudnn(query, key, value, frame_mask, heads, implementation="cudnn"):
    """Attention by cuDNN, which keeps no scores."""
    batch, frames, hidden = query.shape
    # JAX gives cuDNN an odd number of frames only if nothing is differentiated.
    padding = ((0, 0), (0, frames % 2), (0, 0))
    split = (
        jnp.pad(x, padding).reshape(batch, -1, heads, hidden // heads) for x in (query, key, value)
    )
    # A clip without frames, such as a filler row, attends to one frame, so that nothing is NaN.
    lengths = jnp.maximum(_lengths(query, frame_mask), 1)
    mixed = jax.nn.dot_product_attention(
        *split, scale=1.0, key_value_seq_lengths=lengths, implementation=implementation
    )
    return mixed.reshape(batch, -1, hidden)[:, :frames]


def _lengths(x, frame_mask):
    """Real frames of each clip; they come first."""
    if frame_mask is None:
        return jnp.full(x.shape[0], x.shape[1], jnp.int32)
    return frame_mask.sum(axis=-1, dtype=jnp.int32)
