"""Clips in pieces, as a TPU takes them, against whole ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_torch

from flax_asr.models import feature_encoder

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _encoder(platform, **changes):
    config = small_torch.config("xls-r", **changes)
    return feature_encoder.FeatureEncoder(config, jnp.float32, "none", False, platform)


@pytest.mark.parametrize(
    ("batch", "samples", "pieces"),
    [(1, 3999, 8), (2, 3000, 4), (3, 4001, 8), (4, 1000, 2), (8, 1000, 1), (12, 1700, 2)],
)
def test_pieces_give_the_frames_of_whole_clips(batch, samples, pieces):
    audio = np.random.default_rng(0).normal(size=(batch, samples)).astype(np.float32)
    whole, cut = _encoder("cpu"), _encoder("tpu")
    params = jax.jit(whole.init)(jax.random.key(0), audio)
    assert feature_encoder._pieces(cut.config, batch, samples) == pieces
    found, expected = (jax.jit(encoder.apply)(params, audio) for encoder in (cut, whole))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pieces_give_the_gradients_of_whole_clips():
    audio = np.random.default_rng(0).normal(size=(3, 1999)).astype(np.float32)
    whole, cut = _encoder("cpu"), _encoder("tpu")
    params = jax.jit(whole.init)(jax.random.key(0), audio)
    shape = jax.eval_shape(whole.apply, params, audio).shape
    weights = np.random.default_rng(1).normal(size=shape)

    def gradients(encoder):
        return jax.jit(jax.grad(lambda p, a: (encoder.apply(p, a) * weights).sum(), (0, 1)))(
            params, audio
        )

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
        gradients(cut),
        gradients(whole),
    )


@pytest.mark.parametrize(
    ("changes", "batch", "samples"),
    [
        ({"feat_extract_norm": "group"}, 4, 4000),
        ({}, 1, 300),  # so few frames that pieces would mostly overlap
        # a receptive field of 30 frames: what a piece sees of the next one would end behind that
        ({"conv_kernel": [10, 20, 20], "conv_stride": [5, 2, 1]}, 2, 1474),
    ],
)
def test_what_cannot_be_cut_stays_whole(changes, batch, samples):
    config = small_torch.config("xls-r", **changes)
    assert feature_encoder._pieces(config, batch, samples) == 1


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [([10, 3, 2], [5, 2, 2]), ([4, 4], [4, 4]), ([5, 2], [7, 3]), ([10, 20, 20], [5, 2, 1])],
)
def test_pieces_follow_the_convolutions_of_the_configuration(kernel, stride):
    changes = {"conv_kernel": kernel, "conv_stride": stride, "conv_dim": [16] * len(kernel)}
    changes["num_feat_extract_layers"] = len(kernel)
    audio = np.random.default_rng(0).normal(size=(2, 2003)).astype(np.float32)
    whole, cut = _encoder("cpu", **changes), _encoder("tpu", **changes)
    params = jax.jit(whole.init)(jax.random.key(0), audio)
    assert feature_encoder._pieces(cut.config, *audio.shape) > 1
    found, expected = (jax.jit(encoder.apply)(params, audio) for encoder in (cut, whole))
    np.testing.assert_allclose(found, expected, atol=1e-5)
