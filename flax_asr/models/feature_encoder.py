"""From samples to features: the strided convolutions of wav2vec 2.0."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_asr.models import activations, layers


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


class _Convolution(nn.Module):
    """Kernel and bias under the names they have in a checkpoint, initialised as in PyTorch.

    With `centred` the mean over the features is taken from every frame, by way of the parameters.
    """

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    layer: int
    centred: bool

    @nn.compact
    def __call__(self, x: Float[Array, "batch times channels"]) -> Array:
        taps, stride = self.config.conv_kernel[self.layer], self.config.conv_stride[self.layer]
        features = self.config.conv_dim[self.layer]
        channels = x.shape[-1]
        kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("kernel", kaiming, (taps, channels, features))
        if self.centred:
            kernel = _less_mean(kernel)
        y = strided_convolution(x.astype(self.dtype), kernel.astype(self.dtype), stride)
        if self.config.conv_bias:
            init = layers.uniform(1.0 / math.sqrt(channels * taps))
            bias = self.param("bias", init, (features,))
            y = y + (_less_mean(bias) if self.centred else bias).astype(self.dtype)
        return y


def _less_mean(parameters: Float[Array, "... features"]) -> Float[Array, "... features"]:
    return parameters - jnp.mean(parameters, axis=-1, keepdims=True)


class _CentredLayerNorm(nn.Module):
    """LayerNorm over channels whose mean is zero already, statistics in float32."""

    dtype: layers.Dtype
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "batch frames channels"]) -> Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias).astype(self.dtype)


class _InstanceNorm(nn.Module):
    """GroupNorm with a group a channel: mean and variance over all frames, padding included."""

    dtype: layers.Dtype
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "batch frames channels"]) -> Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        centred = x.astype(jnp.float32)
        centred = centred - jnp.mean(centred, axis=1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=1, keepdims=True)
        y = centred * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias
        return y.astype(self.dtype)


class _ConvLayer(nn.Module):
    """Convolution, norm where there is one, activation.

    In half precision the mean that a LayerNorm would take from each frame is taken from kernel and
    bias instead, where it costs nothing: XLA for TPU computes the first convolution once more for
    each statistic of its many frames. The rounding of the kernel leaves a mean far below that of
    the frames.
    """

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    layer: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch times channels"]) -> Array:
        normalised = self.config.feat_extract_norm == "layer"
        centred = normalised and jnp.dtype(self.dtype) != jnp.float32
        y = _Convolution(self.config, self.dtype, self.layer, centred, name="conv")(x)
        # PyTorch keeps its default epsilon here, whatever config.layer_norm_eps is
        if centred:
            y = _CentredLayerNorm(self.dtype, name="layer_norm")(y)
        elif normalised:
            y = layers.layer_norm(self.dtype, "layer_norm")(y)
        elif self.layer == 0:
            y = _InstanceNorm(self.dtype, name="layer_norm")(y)
        name = self.config.feat_extract_activation
        return activations.activation(name, "feat_extract_activation")(y)


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


class FeatureEncoder(nn.Module):
    """The convolution layers; with `freeze`, no gradient is computed through or for them."""

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    remat_policy: str
    freeze: bool

    @nn.compact
    def __call__(
        self, input_values: Float[Array, "batch samples"]
    ) -> Float[Array, "batch frames channels"]:
        stack = _ConvLayers(self.config, self.dtype, self.remat_policy, name="conv_layers")
        features = stack(input_values[:, :, None])
        return jax.lax.stop_gradient(features) if self.freeze else features
