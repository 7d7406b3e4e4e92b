"""The upper part of the model gives what the whole model gives."""

import functools

import jax
import numpy as np
import pytest
from models import small_torch

from flax_asr.models import upper, wav2vec2

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=[True, False], ids=["norms first", "norms last"])
def model(request):
    """(module, parameters, audio, mask of samples, mask of frames)."""
    config = small_torch.config(
        num_hidden_layers=3, do_stable_layer_norm=request.param, **dict.fromkeys(RANDOM, 0.0)
    )
    config.final_dropout = 0.4
    module = wav2vec2.Wav2Vec2ForCTCModule(config)
    rng = np.random.default_rng(0)
    audio = rng.standard_normal((2, 1600)).astype(np.float32)
    mask = np.arange(1600) < np.array([[1600], [900]])
    params = jax.jit(module.init)(jax.random.key(0), audio)["params"]
    noise = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + 0.05 * noise.standard_normal(p.shape), params)
    lengths = wav2vec2.frame_lengths(config, mask.sum(axis=1))
    frames = int(wav2vec2.frame_lengths(config, 1600))
    return module, jax.device_get(params), audio, mask, np.arange(frames) < lengths[:, None]


RANDOM = "hidden_dropout attention_dropout activation_dropout feat_proj_dropout layerdrop".split()


@pytest.mark.parametrize("lower_layers", [0, 2, 3])
def test_the_upper_part_goes_on_where_the_lower_one_ends(model, lower_layers):
    module, params, audio, mask, frame_mask = model
    variables = {"params": params}
    apply = functools.partial(module.apply, output_hidden_states=True)
    whole = jax.jit(apply)(variables, audio, mask)
    # whatever stands in frames of padding
    given = np.where(frame_mask[:, :, None], whole.hidden_states[lower_layers], 7.0)
    part = upper.of(module, lower_layers)
    logits = jax.jit(part.apply)(variables, given, frame_mask)
    np.testing.assert_allclose(logits[frame_mask], whole.logits[frame_mask], atol=1e-5, rtol=0)


def test_dropout_before_the_head_draws_what_the_whole_model_draws(model):
    module, params, audio, mask, frame_mask = model
    rngs = {"dropout": jax.random.key(5)}
    apply = functools.partial(module.apply, deterministic=False, output_hidden_states=True)
    whole = jax.jit(apply)({"params": params}, audio, mask, rngs=rngs)
    part = upper.of(module, 1)
    logits = part.apply(
        {"params": params}, whole.hidden_states[1], frame_mask, deterministic=False, rngs=rngs
    )
    np.testing.assert_allclose(logits[frame_mask], whole.logits[frame_mask], atol=1e-5, rtol=0)
    still = part.apply({"params": params}, whole.hidden_states[1], frame_mask)
    assert np.abs(still - logits).max() > 1e-2
