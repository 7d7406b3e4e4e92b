"""The feature encoder of wav2vec 2.0: strided convolutions from samples to features."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flax_asr.data import buckets
from flax_asr.models import activations, first_layer, layers

_LANES = 128
_ROWS = 8
_EPSILON = 1e-5
"""Epsilon of every norm here: PyTorch uses its default, whatever config.layer_norm_eps is."""


def strided_convolution(
    x: Float[Array, "batch times channels"],
    kernel: Float[Array, "taps channels features"],
    stride: int,
) -> Float[Array, "batch frames features"]:
    """Cross-correlation over time without padding: (times - taps) // stride + 1 frames."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride,),
        padding="VALID",
        dimension_numbers=("NTC", "TIO", "NTC"),
        precision=layers.precision(x.dtype),
    )


def mean_square(
    audio: Float[Array, "batch times"],
    kernel: Float[Array, "taps features"],
    bias: Float[Array, " features"],
    stride: int,
) -> Float[Array, "batch frames"]:
    """The mean over features of the squared frames of a convolution, without the frames.

    With x the samples under the taps, and a 1 for the bias, a frame is K^T x and its sum of squares
    x^T (K K^T) x: a few products for each frame instead of one for each feature.
    """
    taps, features = kernel.shape
    rows = jnp.concatenate([kernel, bias[None]]).astype(jnp.float32)
    gram = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST) / features
    frames = (audio.shape[1] - taps) // stride + 1
    phases = _phases(audio, stride)
    samples = [
        phases[tap % stride][:, tap // stride : tap // stride + frames] for tap in range(taps)
    ]
    samples.append(jnp.ones_like(samples[0]))
    total = sum(
        samples[i] * sum((1 + (i < j)) * gram[i, j] * samples[j] for j in range(i, taps + 1))
        for i in range(taps + 1)
    )
    return jnp.maximum(total, 0.0)


def _phases(audio: Float[Array, "batch times"], stride: int) -> list[Float[Array, "batch steps"]]:
    """`stride` arrays: samples 0, stride, 2 * stride, ...; samples 1, 1 + stride, ...; and so on.

    Computed as a product with a matrix of zeros and ones: other ways of moving data across lanes
    are slow on a TPU.
    """
    block = stride * _LANES
    audio = jnp.pad(audio, ((0, 0), (0, -audio.shape[1] % block)))
    places = np.arange(block).reshape(_LANES, stride).T.ravel()
    chosen = jnp.matmul(
        audio.reshape(audio.shape[0], -1, block),
        jnp.asarray(np.eye(block)[:, places], audio.dtype),
        precision=layers.precision(audio.dtype),
    )
    chosen = jax.lax.optimization_barrier(chosen).astype(jnp.float32)
    phases = jnp.split(chosen, stride, axis=-1)
    return [phase.reshape(audio.shape[0], -1) for phase in phases]


class _ConvolutionParameters(nn.Module):
    """Kernel and bias under their names in a checkpoint, initialised as in PyTorch.

    With `centred` their mean over the features is subtracted, so that the frames have a mean of
    zero too. The bias is zero if the layer has none.
    """

    config: layers.Wav2Vec2Config
    layer: int
    centred: bool

    @nn.compact
    def __call__(self, channels: int) -> tuple[Array, Array]:
        taps, features = self.config.conv_kernel[self.layer], self.config.conv_dim[self.layer]
        kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("kernel", kaiming, (taps, channels, features))
        bias = jnp.zeros(features)
        if self.config.conv_bias:
            init = layers.uniform(1.0 / math.sqrt(channels * taps))
            bias = self.param("bias", init, (features,))
        if self.centred:
            kernel, bias = _centred_features(kernel), _centred_features(bias)
        return kernel, bias


class _NormParameters(nn.Module):
    @nn.compact
    def __call__(self, channels: int) -> tuple[Array, Array]:
        scale = self.param("scale", nn.initializers.ones, (channels,))
        return scale, self.param("bias", nn.initializers.zeros, (channels,))


def _centred_features(parameters: Float[Array, "... features"]) -> Float[Array, "... features"]:
    return parameters - jnp.mean(parameters, axis=-1, keepdims=True)


def _variance(x, y, kernel, bias, stride) -> Float[Array, "batch frames"]:
    """Variance over the features of centred frames `y`."""

    def from_frames(x, y, kernel, bias):
        return jnp.mean(jnp.square(y.astype(jnp.float32)), axis=-1)

    def from_samples(x, y, kernel, bias):
        return mean_square(x[..., 0], kernel[:, 0], bias, stride)

    if x.shape[-1] > 1:
        return from_frames(x, y, kernel, bias)
    return jax.lax.platform_dependent(x, y, kernel, bias, tpu=from_samples, default=from_frames)


class _InstanceNorm(nn.Module):
    """GroupNorm with a group a channel: mean and variance over all frames, padding included."""

    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch frames channels"]) -> Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        centred = x.astype(jnp.float32)
        centred = centred - jnp.mean(centred, axis=1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=1, keepdims=True)
        y = centred * (jax.lax.rsqrt(variance + _EPSILON) * scale) + bias
        return y.astype(self.dtype)


class _ConvLayer(nn.Module):
    """Convolution, norm if the layer has one, activation.

    In half precision the mean that a LayerNorm subtracts from each frame is subtracted from kernel
    and bias instead, which costs nothing; the mean that the kernel's rounding leaves is far below
    the rounding of the frames. On TPU the variance of the first layer's frames is computed from the
    samples, as XLA would compute that convolution again for each statistic; in bfloat16, if the
    layer is not trained, all of it is a Pallas kernel (first_layer.py).
    """

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    layer: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch times channels"]) -> Array:
        config, dtype = self.config, jnp.dtype(self.dtype)
        stride, channels = config.conv_stride[self.layer], x.shape[-1]
        normalised = config.feat_extract_norm == "layer"
        centred = normalised and dtype != jnp.float32
        parameters = _ConvolutionParameters(config, self.layer, centred, name="conv")
        kernel, bias = parameters(channels)
        x, kernel, bias = (array.astype(dtype) for array in (x, kernel, bias))

        def convolved(x, kernel, bias):
            y = strided_convolution(x, kernel, stride)
            return y + bias if config.conv_bias else y

        activation = activations.activation(
            config.feat_extract_activation, "feat_extract_activation"
        )
        if not centred:
            y = convolved(x, kernel, bias)
            if normalised:
                y = layers.layer_norm(dtype, "layer_norm", _EPSILON)(y)
            elif self.layer == 0:
                y = _InstanceNorm(dtype, name="layer_norm")(y)
            return activation(y)

        def plain(x, kernel, bias, scale, shift):
            y = convolved(x, kernel, bias)
            inverse = jax.lax.rsqrt(_variance(x, y, kernel, bias, stride) + _EPSILON)[..., None]
            y = y.astype(jnp.float32) * (inverse * scale) + shift
            return activation(y.astype(dtype))

        arrays = (x, kernel, bias, *_NormParameters(name="layer_norm")(kernel.shape[-1]))
        taps, _, features = kernel.shape
        if (
            channels == 1
            and dtype == jnp.bfloat16
            and activation is activations.gelu
            and first_layer.suits(x.shape[0], taps, features, stride)
        ):
            return _without_gradient(plain, stride)(*arrays)
        return plain(*arrays)


def _without_gradient(plain, stride):
    """`plain`, computed by the kernel on TPU if nothing is differentiated."""

    def by_kernel(x, kernel, bias, scale, shift):
        return first_layer.frames(x[..., 0], kernel[:, 0], bias, scale, shift, stride, _EPSILON)

    @jax.custom_vjp
    def layer(*arrays):
        return jax.lax.platform_dependent(*arrays, tpu=by_kernel, default=plain)

    layer.defvjp(lambda *arrays: jax.vjp(plain, *arrays), lambda pull, gradient: pull(gradient))
    return layer


class _ConvLayers(nn.Module):
    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    remat_policy: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch times channels"]) -> Array:
        conv_layer = layers.rematerialised(_ConvLayer, self.remat_policy)
        for layer in range(len(self.config.conv_dim)):
            x = conv_layer(self.config, self.dtype, layer, name=str(layer))(x)
        return x


def _pieces(config: layers.Wav2Vec2Config, rows: int, samples: int) -> int:
    """Number of pieces that a clip is cut into on TPU, so that all pieces fill whole tiles of rows.

    Without it, 4 clips of 10 s take twice as long as 8, and three times as long to compile. It is
    not possible with a norm over all frames of a clip, or in pieces shorter than a receptive field.
    """
    taps, stride = _receptive_field(config)
    pieces = math.lcm(rows, _ROWS) // rows
    frames = (samples - taps) // stride + 1
    fewest = pieces * max(2, -(-taps // stride))
    return pieces if config.feat_extract_norm == "layer" and frames >= fewest else 1


def _receptive_field(config: layers.Wav2Vec2Config) -> tuple[int, int]:
    """The receptive field of a frame and the stride from one to the next, in samples."""
    taps = buckets.smallest_samples(1, config.conv_kernel, config.conv_stride)
    return taps, math.prod(config.conv_stride)


def _cut(
    audio: Float[Array, "batch samples"], pieces: int, config: layers.Wav2Vec2Config
) -> Float[Array, "rows piece"]:
    """Every clip as `pieces` rows with the same number of frames, padded with zeros at the end."""
    batch, samples = audio.shape
    taps, stride = _receptive_field(config)
    frames = -(-((samples - taps) // stride + 1) // pieces)
    end = pieces * frames * stride
    audio = jnp.pad(audio, ((0, 0), (0, max(0, end + taps - samples))))[:, : end + taps]
    firsts = audio[:, :end].reshape(batch, pieces, -1)
    # The samples of the next piece that the last frames of a piece depend on.
    overlaps = jnp.concatenate([firsts[:, 1:, :taps], audio[:, None, end:]], axis=1)
    whole = jnp.concatenate([firsts, overlaps[:, :, : max(0, taps - stride)]], axis=2)
    return whole.reshape(batch * pieces, -1)


class FeatureEncoder(nn.Module):
    """The convolution layers; with `freeze`, no gradient is computed for or through them."""

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    remat_policy: str
    freeze: bool
    platform: str = "cpu"

    @nn.compact
    def __call__(
        self, input_values: Float[Array, "batch samples"]
    ) -> Float[Array, "batch frames channels"]:
        stack = _ConvLayers(self.config, self.dtype, self.remat_policy, name="conv_layers")
        batch, samples = input_values.shape
        pieces = _pieces(self.config, batch, samples) if self.platform == "tpu" else 1
        if pieces == 1:
            features = stack(input_values[:, :, None])
        else:
            taps, stride = _receptive_field(self.config)
            features = stack(_cut(input_values, pieces, self.config)[:, :, None])
            features = features.reshape(batch, -1, features.shape[-1])
            features = features[:, : (samples - taps) // stride + 1]
        return jax.lax.stop_gradient(features) if self.freeze else features
