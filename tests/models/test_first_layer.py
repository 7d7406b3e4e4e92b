"""The feature encoder's first layer as a kernel, against XLA's operations in float32."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_torch

from flax_asr import plan
from flax_asr.estimate import chips
from flax_asr.models import feature_encoder, first_layer

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _parameters(taps, features, seed=0):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(0, 0.3, (taps, features))
    bias = rng.normal(0, 0.1, features)
    kernel, bias = (a - a.mean(-1, keepdims=True) for a in (kernel, bias))
    scale, shift = rng.normal(1, 0.1, features), rng.normal(0, 0.1, features)
    # what bfloat16 holds, so that both sides compute with the same
    kernel, bias = (jnp.asarray(a, jnp.bfloat16).astype(jnp.float32) for a in (kernel, bias))
    return kernel, bias, jnp.asarray(scale, jnp.float32), jnp.asarray(shift, jnp.float32)


@pytest.mark.parametrize(
    ("batch", "times", "taps", "stride"),
    [
        (8, 1000, 10, 5),
        (8, 4007, 10, 5),
        (16, 2005, 10, 5),
        (8, 333, 7, 3),
        (8, 10, 10, 5),
        (64, 400, 4, 4),
        (128, 1700, 10, 5),
    ],
)
def test_frames_are_those_of_xla(batch, times, taps, stride):
    kernel, bias, scale, shift = _parameters(taps, 128)
    audio = np.random.default_rng(1).normal(size=(batch, times))
    audio = jnp.asarray(audio, jnp.bfloat16)
    found = first_layer.frames(
        audio, kernel, bias, scale, shift, stride, 1e-5, interpret=True
    ).astype(jnp.float32)

    y = feature_encoder.strided_convolution(
        audio.astype(jnp.float32)[..., None], kernel[:, None], stride
    )
    y = y + bias
    y = y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5) * scale + shift
    expected = jax.nn.gelu(y, approximate=False)
    assert found.shape == expected.shape
    # half of bfloat16's last place, and what its GELU is off
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(
    ("batch", "taps", "features", "stride"),
    [(4, 10, 512, 5), (24, 10, 512, 5), (8, 16, 512, 5), (8, 10, 96, 5), (8, 10, 512, 8)],
)
def test_what_does_not_fill_whole_tiles_is_left_to_xla(batch, taps, features, stride):
    assert first_layer.suits(8, 10, 512, 5)
    assert not first_layer.suits(batch, taps, features, stride)


@pytest.mark.parametrize(
    ("batch", "dtype", "is_kernel"),
    [(8, jnp.bfloat16, True), (4, jnp.bfloat16, False), (8, jnp.float32, False)],
)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_first_layer_that_is_not_trained_is_a_kernel_on_tpu(
    batch, dtype, is_kernel, checkpointing
):
    config = small_torch.config(conv_dim=[128] * 3)
    encoder = feature_encoder.FeatureEncoder(config, dtype, checkpointing, False)
    audio = jnp.zeros((batch, 4000))
    params = jax.eval_shape(encoder.init, jax.random.key(0), audio)

    def loss(weight, params):
        return (encoder.apply(params, audio).astype(jnp.float32) * weight).sum()

    def text(function):
        arrays = (jax.ShapeDtypeStruct((128,), jnp.float32), params)
        lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",))
        return lowered.as_text()

    assert ("first_layer" in text(loss)) == is_kernel
    assert ("first_layer" in text(jax.grad(loss))) == is_kernel
    assert "first_layer" not in text(jax.grad(loss, 1))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:1x1", "v4:2x2x1", "v5p:2x2x1", "v6e:2x4"])
@pytest.mark.parametrize("batch", [8, 32])
def test_the_real_tpu_compiler_takes_the_kernel(topology, batch):
    device = plan.describe(chips.parse(topology)).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def shape(size, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    frames = jax.jit(lambda *arrays: first_layer.frames(*arrays, 5, 1e-5))
    vectors = [shape((512,))] * 3
    arrays = (shape((batch, 16_080), jnp.bfloat16), shape((10, 512)), *vectors)
    text = frames.trace(*arrays).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert "tpu_custom_call" in text
