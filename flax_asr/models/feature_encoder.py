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
    """Kernel and bias under the names they have in a checkpoint, initialised as in PyTorch."""

    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    layer: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch times channels"]) -> Array:
        taps, stride = self.config.conv_kernel[self.layer], self.config.conv_stride[self.layer]
        features = self.config.conv_dim[self.layer]
        channels = x.shape[-1]
        kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("kernel", kaiming, (taps, channels, features))
        y = strided_convolution(x.astype(self.dtype), kernel.astype(self.dtype), stride)
        if self.config.conv_bias:
            init = layers.uniform(1.0 / math.sqrt(channels * taps))
            y = y + self.param("bias", init, (features,)).astype(self.dtype)
        return y


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
    config: layers.Wav2Vec2Config
    dtype: layers.Dtype
    layer: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch times channels"]) -> Array:
        y = _Convolution(self.config, self.dtype, self.layer, name="conv")(x)
        # PyTorch keeps its default epsilon here, whatever config.layer_norm_eps is
        if self.config.feat_extract_norm == "layer":
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
