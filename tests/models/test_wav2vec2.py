"""The linen modules against transformers' PyTorch classes, and against themselves."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_torch
import torch
import transformers
from jax.extend import core as jax_core

from flax_asr import errors
from flax_asr.models import convert, feature_encoder, layers, positional, wav2vec2

SAMPLES, SHORT = 1200, 777

# Architecture, and changes that take the sizes and functions through their range.
MODELS = {
    "xls-r": ("xls-r", {}),
    "base": ("base", {}),
    "layer-post": ("layer-post", {"hidden_act": "gelu_new", "feat_extract_activation": "relu"}),
    "group-stable": ("group-stable", {"hidden_act": "silu", "feat_extract_activation": "gelu_new"}),
    "odd kernel": (
        "xls-r",
        {"num_conv_pos_embeddings": 7, "num_conv_pos_embedding_groups": 1, "hidden_act": "relu"},
    ),
    "long strides": (
        "xls-r",
        {"conv_dim": [9, 7], "conv_kernel": [33, 8], "conv_stride": [16, 3], "conv_bias": False},
    ),
    "one by one": (
        "base",
        {
            "conv_dim": [8, 8],
            "conv_kernel": [11, 1],
            "conv_stride": [20, 1],
            "num_conv_pos_embeddings": 2,
            "num_conv_pos_embedding_groups": 24,
        },
    ),
    "more taps than frames": ("xls-r", {"num_conv_pos_embeddings": 128}),
}


pytestmark = pytest.mark.usefixtures("quick_compilation")


def batch(samples=SAMPLES, short=SHORT, seed=0):
    """Two rows of noise, the second one padded with zeros, and their mask."""
    values = np.random.default_rng(seed).normal(size=(2, samples)).astype(np.float32)
    mask = np.arange(samples) < np.array([[samples], [short]])
    return values * mask, mask


def pair(name, **changes):
    """The torch model, our module and the parameters they share."""
    architecture, own = MODELS[name]
    config = small_torch.config(architecture, **own, **changes)
    config._attn_implementation = "eager"
    built = small_torch.model("Wav2Vec2ForCTC", config)
    params = convert.params_from_torch(small_torch.tensors(built), config, head=True)
    return built, wav2vec2.Wav2Vec2ForCTCModule(config), {"params": params}


def flat(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def changed(module, **config_changes):
    """The module with another configuration or other attributes, for the same parameters."""
    config = copy.deepcopy(module.config)
    for key, value in config_changes.items():
        setattr(config, key, value)
    return module.clone(config=config)


DROPOUTS = (
    "hidden_dropout",
    "attention_dropout",
    "activation_dropout",
    "feat_proj_dropout",
    "final_dropout",
    "layerdrop",
)


def without_randomness(config):
    for key in DROPOUTS:
        setattr(config, key, 0.0)
    return config


def close(ours, theirs, tolerance, name=""):
    """Within `tolerance` of the largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    scale = max(np.abs(theirs).max(), 1e-6)
    assert np.abs(ours - theirs).max() <= tolerance * scale, name


# Against PyTorch


@pytest.mark.parametrize("masked", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_pytorchs(name, masked):
    built, module, params = pair(name)
    values, mask = batch()
    mask = mask if masked else None
    with torch.no_grad():
        theirs = built(
            torch.tensor(values),
            attention_mask=None if mask is None else torch.tensor(mask).long(),
            output_hidden_states=True,
            output_attentions=True,
        )
        last = built.wav2vec2(
            torch.tensor(values),
            attention_mask=None if mask is None else torch.tensor(mask).long(),
        ).last_hidden_state
    ours = jax.jit(
        lambda params, values, mask: module.apply(
            params, values, mask, output_hidden_states=True, output_attentions=True
        )
    )(params, values, mask)
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-4, rtol=0)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    assert len(ours.attentions) == len(theirs.attentions) == 2
    # transformers 5 gives the last one before the final layer norm, 4.57 after it, as we do
    expected = (*theirs.hidden_states[:-1], last)
    for mine, other in zip(ours.hidden_states, expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-4, rtol=0)
    for mine, other in zip(ours.attentions, theirs.attentions, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_pytorchs(name):
    built, module, params = pair(name)
    values, mask = batch()
    frames = wav2vec2.frame_lengths(module.config, mask.sum(axis=-1))
    shape = (2, int(frames.max()), module.config.vocab_size)
    weights = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    weights *= np.arange(shape[1])[None, :, None] < frames[:, None, None]

    logits = built(torch.tensor(values), attention_mask=torch.tensor(mask).long()).logits
    (torch.log_softmax(logits, -1) * torch.tensor(weights)).sum().backward()
    gradients = {
        key: np.zeros(parameter.shape, np.float32)
        if parameter.grad is None
        else parameter.grad.numpy()
        for key, parameter in built.named_parameters()
    }
    theirs = flat(convert.params_from_torch(gradients, module.config, head=True))

    def loss(params):
        logits = module.apply(params, values, mask).logits
        return (jax.nn.log_softmax(logits) * weights).sum()

    ours = flat(jax.jit(jax.grad(loss))(params)["params"])
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(gradient).max() for gradient in theirs.values())
    for key, expected in theirs.items():
        # key biases shift all scores alike: their true gradient is zero, what is left is rounding
        floor = 1e-6 * largest
        error = np.abs(ours[key] - expected).max()
        assert error <= 1e-3 * np.abs(expected).max() + floor, key


def test_masked_frames_get_the_mask_embedding_as_in_pytorch():
    built, module, params = pair("xls-r")
    values, mask = batch()
    frames = int(wav2vec2.frame_lengths(module.config, SAMPLES))
    masked = np.random.default_rng(2).random((2, frames)) < 0.4
    with torch.no_grad():
        theirs = built.wav2vec2(
            torch.tensor(values),
            attention_mask=torch.tensor(mask).long(),
            mask_time_indices=torch.tensor(masked),
        ).last_hidden_state
    encoder = wav2vec2.Wav2Vec2Module(module.config)
    own = {"params": params["params"]["wav2vec2"]}
    ours = encoder.apply(own, values, mask, masked).last_hidden_state
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    unmasked = encoder.apply(own, values, mask).last_hidden_state
    assert np.abs(ours - unmasked).max() > 0.1
    unused = changed(encoder, apply_spec_augment=False).apply(own, values, mask, masked)
    np.testing.assert_array_equal(unused.last_hidden_state, unmasked)


def test_masked_channels_are_zero_before_the_encoder():
    built, module, params = pair("xls-r")
    values, _ = batch()
    channels = np.random.default_rng(3).random((2, module.config.hidden_size)) < 0.3
    original = built.wav2vec2.feature_projection.forward

    def projection(features):
        x, normalised = original(features)
        return x * ~torch.tensor(channels)[:, None, :], normalised

    built.wav2vec2.feature_projection.forward = projection
    with torch.no_grad():
        theirs = built(torch.tensor(values)).logits
    ours = module.apply(params, values, mask_feature_indices=channels).logits
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    assert np.abs(ours - module.apply(params, values).logits).max() > 1e-2


@pytest.mark.parametrize("name", ["xls-r", "long strides", "one by one"])
def test_frame_lengths_equal_pytorchs_on_every_kind_of_integer(name):
    built, module, _ = pair(name)
    samples = np.array([0, 1, 9, 33, 400, 401, SAMPLES, 160_000], np.int32)
    theirs = built._get_feat_extract_output_lengths(torch.tensor(samples)).numpy()
    theirs = np.maximum(theirs, 0)
    np.testing.assert_array_equal(wav2vec2.frame_lengths(module.config, samples), theirs)
    np.testing.assert_array_equal(
        wav2vec2.frame_lengths(module.config, jnp.asarray(samples)), theirs
    )
    for count, expected in zip(samples, theirs, strict=True):
        length = wav2vec2.frame_lengths(module.config, int(count))
        assert (type(length), length) == (int, expected)


# The convolutions, on their own


@pytest.mark.parametrize(
    ("batch_size", "frames", "hidden", "groups", "taps"),
    [(2, 37, 12, 3, 8), (1, 9, 8, 8, 9), (3, 5, 6, 1, 16), (2, 40, 4, 2, 1), (1, 1, 4, 2, 2)],
)
def test_positional_convolution_equals_xlas_and_pytorchs(batch_size, frames, hidden, groups, taps):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch_size, frames, hidden)).astype(np.float32)
    weight = rng.normal(size=(hidden, hidden // groups, taps)).astype(np.float32)
    upstream = rng.normal(size=x.shape).astype(np.float32)

    def results(function):
        y, pull_back = jax.vjp(lambda x, weight: function(x, weight, groups), x, weight)
        return (y, *pull_back(upstream))

    ours = jax.jit(lambda: results(positional.grouped_convolution))()
    plain = jax.jit(lambda: results(positional.direct_convolution))()
    by_tap = jax.jit(
        lambda: (
            positional._by_tap(x, weight, groups),
            *positional._by_tap_gradient(x, weight, upstream, groups),
        )
    )()
    tensor = torch.tensor(x.transpose(0, 2, 1)).requires_grad_()
    kernel = torch.tensor(weight).requires_grad_()
    y = torch.nn.functional.conv1d(tensor, kernel, padding=taps // 2, groups=groups)[..., :frames]
    y.backward(torch.tensor(upstream.transpose(0, 2, 1)))
    theirs = (
        y.detach().numpy().transpose(0, 2, 1),
        tensor.grad.numpy().transpose(0, 2, 1),
        kernel.grad.numpy(),
    )
    for mine, xla, tpu, other in zip(ours, plain, by_tap, theirs, strict=True):
        close(mine, other, 2e-6)
        close(xla, other, 2e-6)
        close(tpu, other, 2e-6)


def test_positional_convolution_is_xlas_where_the_backend_is_not_a_cpu():
    x, weight = jnp.zeros((1, 20, 8)), jnp.zeros((8, 4, 8))

    def loss(x, weight):
        return positional.grouped_convolution(x, weight, 2).sum()

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, weight)
    assert "stablehlo.convolution" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.convolution" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize(
    ("times", "taps", "stride"), [(160, 10, 5), (163, 10, 5), (41, 3, 2), (30, 7, 3), (9, 4, 4)]
)
def test_the_mean_square_of_frames_comes_from_the_samples(times, taps, stride):
    rng = np.random.default_rng(0)
    audio = rng.normal(size=(2, times)).astype(np.float32)
    kernel = rng.normal(size=(taps, 12)).astype(np.float32)
    bias = rng.normal(size=12).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(audio, taps, axis=1)[:, ::stride]
    frames = windows.astype(np.float64) @ kernel + bias
    found = feature_encoder.mean_square(audio, kernel, bias, stride)
    close(found, (frames**2).mean(axis=-1), 1e-6)


# Precision


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["xls-r", "base"])
def test_half_precision_is_near_float32_and_trains_float32_parameters(name, dtype):
    _, module, params = pair(name)
    values, mask = batch()
    half = module.clone(dtype=dtype)
    expected = module.apply(params, values, mask).logits

    def loss(params):
        logits = half.apply(params, values, mask).logits
        return jnp.square(logits).mean(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert logits.dtype == jnp.float32
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 0 < error < (0.05 if dtype == jnp.bfloat16 else 0.01)
    exact = jax.jit(
        jax.grad(lambda params: jnp.square(module.apply(params, values, mask).logits).mean())
    )(params)
    for (key, gradient), reference in zip(
        flat(gradients).items(), flat(exact).values(), strict=True
    ):
        assert gradient.dtype == jnp.float32
        assert np.isfinite(gradient).all(), key
        if "k_proj/bias" not in key:
            close(gradient, reference, 0.2, key)


@pytest.mark.parametrize("platform", ["default", "tpu"])
def test_statistics_taken_from_parameters_and_samples_are_those_of_the_layer_norm(
    platform, monkeypatch
):
    """The form that TPUs compute runs here too."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *xs, **forms: forms[platform](*xs))
    _, module, params = pair("xls-r")
    params = params["params"]["wav2vec2"]["feature_extractor"]
    shifted = {
        number: layer
        | {"conv": {name: p + 0.5 * abs(p).max() for name, p in layer["conv"].items()}}
        for number, layer in params["conv_layers"].items()
    }
    values, _ = batch()

    def features(dtype):
        encoder = feature_encoder.FeatureEncoder(module.config, dtype, "none", False)
        return np.asarray(encoder.apply({"params": {"conv_layers": shifted}}, values), np.float32)

    expected = features(jnp.float32)
    error = np.abs(features(jnp.float16) - expected).max() / np.abs(expected).max()
    assert error < 0.01


def products(jaxpr):
    """Every dot and convolution of a program, those inside calls included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for inner in jax_core.jaxprs_in_params(equation.params):
            yield from products(inner)


def test_float32_asks_every_product_for_full_precision():
    _, module, params = pair("xls-r")
    values, mask = batch()

    def loss(module, params):
        return module.apply(params, values, mask).logits.sum()

    highest = (jax.lax.Precision.HIGHEST,) * 2
    found = list(products(jax.make_jaxpr(jax.grad(lambda p: loss(module, p)))(params).jaxpr))
    assert len(found) > 50
    assert {equation.params["precision"] for equation in found} == {highest}
    half = module.clone(dtype=jnp.bfloat16)
    found = list(products(jax.make_jaxpr(jax.grad(lambda p: loss(half, p)))(params).jaxpr))
    assert None in {equation.params["precision"] for equation in found}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_heads_gradient_is_rounded_in_bfloat16_only(dtype):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), dtype) for s in [(2, 3, 4), (4, 5)])
    upstream = jnp.asarray(rng.normal(size=(2, 3, 5)) * 1e-6, jnp.float32)
    scores, pull_back = jax.vjp(wav2vec2._scores, x, kernel)
    assert scores.dtype == jnp.float32
    rounded = upstream.astype(dtype if dtype == jnp.bfloat16 else jnp.float32)
    exact_x, exact_kernel, exact = (
        np.asarray(a.astype(jnp.float32), np.float64) for a in (x, kernel, rounded)
    )
    expected = exact @ exact_kernel.T, np.einsum("bth,btv->hv", exact_x, exact)
    for found, right in zip(pull_back(upstream), expected, strict=True):
        assert found.dtype == dtype
        right = jnp.asarray(right, jnp.float32).astype(dtype).astype(jnp.float32)
        tolerance = 1e-6 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(found.astype(jnp.float32), right, rtol=tolerance, atol=1e-7)


# Padding


@pytest.mark.parametrize("name", ["xls-r", "layer-post"])
def test_padding_does_not_change_layer_norm_encoders(name):
    _, module, params = pair(name)
    values, mask = batch()
    alone = module.apply(params, values[1:, :SHORT], mask[1:, :SHORT]).logits[0]
    padded = module.apply(params, values, mask).logits[1, : alone.shape[0]]
    # what stands in the padding does not matter either
    more = np.pad(values, ((0, 0), (0, 700)), constant_values=3.0)
    wider = module.apply(params, more, np.pad(mask, ((0, 0), (0, 700)))).logits[1]
    np.testing.assert_allclose(padded, alone, atol=1e-5)
    np.testing.assert_allclose(wider[: alone.shape[0]], alone, atol=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("xls-r", jnp.float16), ("base", jnp.float32)])
def test_an_empty_row_gives_finite_numbers_and_leaves_the_others_alone(name, dtype):
    _, module, params = pair(name)
    module = module.clone(dtype=dtype)
    values, mask = batch()
    alone = module.apply(params, values[:1], mask[:1]).logits[0]
    values[1], mask[1] = 0.0, False

    def loss(params):
        logits = module.apply(params, values, mask).logits
        return logits[0].sum(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert np.isfinite(logits).all()
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))
    np.testing.assert_allclose(logits[0], alone, atol=1e-5 if dtype == jnp.float32 else 1e-2)


# Dropout, layerdrop


@pytest.mark.parametrize("name", ["xls-r", "base"])
@pytest.mark.parametrize("place", DROPOUTS)
def test_each_dropout_acts_in_training_and_only_there(name, place):
    _, module, params = pair(name)
    without_randomness(module.config)
    values, mask = batch()
    module_with = changed(module, **{place: 0.5})
    expected = module.apply(params, values, mask).logits

    def run(module, seed, deterministic):
        rngs = {"dropout": jax.random.key(seed)}
        return module.apply(params, values, mask, deterministic=deterministic, rngs=rngs).logits

    np.testing.assert_array_equal(run(module_with, 0, True), expected)
    np.testing.assert_array_equal(run(module, 0, False), expected)
    first = run(module_with, 0, False)
    np.testing.assert_array_equal(first, run(module_with, 0, False))
    others = [run(module_with, seed, False) for seed in (1, 2, 3)]
    assert max(np.abs(first - other).max() for other in others) > 1e-2


def test_evaluation_needs_no_key_and_uses_no_configured_mask():
    _, module, params = pair("xls-r")
    values, mask = batch()
    expected = changed(module, mask_time_prob=0.0, mask_feature_prob=0.0)
    busy = changed(module, mask_time_prob=0.9, mask_feature_prob=0.9, hidden_dropout=0.9)
    np.testing.assert_array_equal(
        busy.apply(params, values, mask).logits, expected.apply(params, values, mask).logits
    )


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expectation_and_drops_the_share(rate):
    x = jnp.full((400, 500), 3.0)
    dropout = layers.Dropout(rate, False)
    y = np.asarray(dropout.apply({}, x, rngs={"dropout": jax.random.key(0)}))
    assert (y == 0).mean() == pytest.approx(rate, abs=0.005)
    assert y.mean() == pytest.approx(3.0, rel=0.02)
    assert np.unique(y[y != 0]).size == 1


def test_what_is_dropped_is_independent_of_place_and_key():
    shape = (512, 512)
    words = [jnp.array(pair, jnp.uint32) for pair in ((0, 0), (0, 1), (1, 0), (7, 123456))]
    drawn = [np.asarray(layers.hashed(layers.flat_places(shape), pair)) for pair in words]
    bits = [((d[..., None] >> np.arange(32, dtype=np.uint32)) & 1) * 2.0 - 1 for d in drawn]
    bound = 5 / np.sqrt(shape[0] * shape[1])  # five standard deviations of a fair coin's mean
    for i, one in enumerate(bits):
        assert np.abs(one.mean(axis=(0, 1))).max() < bound
        for axis in (0, 1):
            for lag in (1, 2, 64):
                neighbour = one * np.roll(one, lag, axis)
                assert np.abs(neighbour.mean(axis=(0, 1))).max() < bound
        for other in bits[:i]:
            assert np.abs((one * other).mean(axis=(0, 1))).max() < bound


def test_the_gradient_of_dropout_has_the_mask_of_its_values_and_keeps_no_mask():
    x, words = jnp.full((64, 128), 3.0), jnp.array([3, 5], jnp.uint32)

    def drop(x):
        return layers.dropped(x, words, 0.4)

    y, pull_back = jax.vjp(drop, x)
    np.testing.assert_allclose(pull_back(jnp.ones_like(x))[0], y / 3.0, rtol=1e-6)
    assert {leaf.shape for leaf in jax.tree.leaves(pull_back)} == {(2,)}

    # nor can XLA see that both passes have the same mask, and keep it
    def loss(x):
        return jnp.square(drop(x)).sum()

    assert "optimization_barrier" in jax.jit(jax.grad(loss)).lower(x).as_text()


def test_dropout_of_everything_and_of_nothing():
    x = jnp.ones((3, 4))
    rngs = {"dropout": jax.random.key(0)}
    assert not layers.Dropout(1.0, False).apply({}, x, rngs=rngs).any()
    assert layers.Dropout(0.0, False).apply({}, x) is x
    assert layers.Dropout(0.5, True).apply({}, x) is x


@pytest.mark.parametrize(("name", "platform"), [("xls-r", "cpu"), ("base", "cpu"), ("base", "tpu")])
def test_layerdrop_of_one_is_a_model_without_layers(name, platform):
    _, module, params = pair(name)
    module = module.clone(platform=platform, attention="xla")
    without_randomness(module.config)
    values, mask = batch()
    rngs = {"dropout": jax.random.key(0)}
    dropped = changed(module, layerdrop=1.0).apply(
        params,
        values,
        mask,
        deterministic=False,
        rngs=rngs,
        output_attentions=True,
        output_hidden_states=True,
    )
    empty = changed(module, num_hidden_layers=0).apply(params, values, mask)
    np.testing.assert_allclose(dropped.logits, empty.logits, atol=1e-6)
    assert len(dropped.hidden_states) == 3
    assert not any(weights.any() for weights in dropped.attentions)


@pytest.mark.parametrize(
    ("remat_policy", "platform"), [("none", "cpu"), ("full", "cpu"), ("full", "tpu")]
)
def test_a_dropped_layer_that_overflows_leaves_the_gradients_finite(remat_policy, platform):
    _, module, params = pair("xls-r")
    module = module.clone(platform=platform, attention="xla")
    without_randomness(module.config)
    values, mask = batch()
    broken = params["params"]["wav2vec2"]["encoder"]["layers"]["1"]["feed_forward"]
    broken["intermediate_dense"]["kernel"] = np.full_like(
        broken["intermediate_dense"]["kernel"], 1e38
    )

    def loss(params, rate):
        dropping = changed(module, layerdrop=rate).clone(remat_policy=remat_policy)
        rngs = {"dropout": jax.random.key(0)}
        return dropping.apply(params, values, mask, deterministic=False, rngs=rngs).logits.sum()

    def finite(rate):
        value, gradients = jax.jit(jax.value_and_grad(lambda params: loss(params, rate)))(params)
        return bool(np.isfinite(value)) and all(
            bool(np.isfinite(gradient).all()) for gradient in jax.tree.leaves(gradients)
        )

    assert not finite(0.0)
    assert finite(1.0)


def test_both_forms_of_layerdrop_leave_out_the_same_layers_and_have_the_same_gradients():
    _, module, params = pair("xls-r")
    without_randomness(module.config)
    module = changed(module, layerdrop=0.5).clone(attention="xla")
    values, mask = batch(400, 300)

    @jax.jit
    def both(key):
        def loss(params, module):
            out = module.apply(
                params,
                values,
                mask,
                deterministic=False,
                rngs={"dropout": key},
                output_attentions=True,
            )
            return jnp.square(out.logits).sum(), out.attentions

        return [
            jax.grad(loss, has_aux=True)(params, module.clone(platform=platform))
            for platform in ("tpu", "cpu")
        ]

    seen = set()
    for seed in range(6):
        (ours, weights), (theirs, expected) = both(jax.random.key(seed))
        seen.add(tuple(bool(layer.any()) for layer in weights))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), weights, expected)
        theirs = flat(theirs)
        for key, gradient in flat(ours).items():
            if "k_proj/bias" not in key:  # zero but for rounding
                close(gradient, theirs[key], 1e-5, key)
    assert len(seen) >= 3


# The frozen feature encoder, rematerialisation


@pytest.mark.parametrize("name", ["xls-r", "base"])
def test_a_frozen_feature_encoder_gives_the_same_outputs_and_zero_gradient(name):
    _, module, params = pair(name)
    values, mask = batch()

    def loss(params, freeze):
        logits = module.apply(params, values, mask, freeze_feature_encoder=freeze).logits
        return jnp.square(logits).sum(), logits

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    free, logits = gradient(params, False)
    frozen, frozen_logits = gradient(params, True)
    np.testing.assert_allclose(logits, frozen_logits, atol=1e-6)
    free = flat(free)
    for key, gradient in flat(frozen).items():
        if "feature_extractor" in key:
            assert not gradient.any(), key
            assert free[key].any(), key
        elif "k_proj/bias" not in key:
            close(gradient, free[key], 1e-5, key)


@pytest.mark.slow
def test_rematerialisation_does_not_change_loss_or_gradients():
    _, module, params = pair("xls-r", num_hidden_layers=1)
    module = changed(module, layerdrop=0.3)
    values, mask = batch(400, 300)

    def loss(params, module):
        rngs = {"dropout": jax.random.key(5)}
        logits = module.apply(params, values, mask, deterministic=False, rngs=rngs).logits
        return jnp.square(logits).mean()

    def run(module):
        return jax.jit(jax.value_and_grad(lambda params: loss(params, module)))(params)

    expected, expected_gradients = run(module)
    expected_gradients = flat(expected_gradients)
    for policy in layers.REMAT_POLICIES[1:]:
        value, gradients = run(module.clone(remat_policy=policy))
        assert value == pytest.approx(float(expected), rel=1e-6), policy
        for key, gradient in flat(gradients).items():
            if "k_proj/bias" not in key:
                close(gradient, expected_gradients[key], 1e-4, f"{policy} {key}")


def test_every_layer_drops_other_activations():
    """They are traced once, but each has a key of its own."""
    _, module, params = pair("xls-r", num_hidden_layers=3, hidden_dropout=0.5, layerdrop=0.0)
    stack = params["params"]["wav2vec2"]["encoder"]["layers"]
    for layer in stack.values():
        for leaf in jax.tree.leaves(layer):
            leaf[:] = 0.0
        # Attention adds a one to each activation that it keeps, feed-forward nothing.
        layer["attention"]["out_proj"]["bias"][:] = 1.0
    states = module.apply(
        params,
        *batch(),
        deterministic=False,
        output_hidden_states=True,
        rngs={"dropout": jax.random.key(0), "masking": jax.random.key(1)},
    ).hidden_states
    # The last of the states has passed the encoder's own norm.
    first, second = (states[i + 1] - states[i] > 1.0 for i in range(2))
    assert first.mean() == pytest.approx(0.5, abs=0.05)
    assert (first != second).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("platform", "policy"), [("cpu", "none"), ("tpu", "full")])
def test_a_program_has_the_code_of_one_layer_however_many_there_are(platform, policy):
    """Else Python would trace each of them in each program, at every start."""

    def products(count):
        config = small_torch.config(num_hidden_layers=count, layerdrop=0.1)
        module = wav2vec2.Wav2Vec2ForCTCModule(config, remat_policy=policy, platform=platform)
        values = jnp.zeros((2, SAMPLES))
        params = jax.eval_shape(lambda: module.init(jax.random.key(0), values))

        def loss(params, key):
            rngs = {"dropout": key, "masking": key}
            return module.apply(params, values, deterministic=False, rngs=rngs).logits.sum()

        program = jax.jit(jax.grad(loss)).lower(params, jax.random.key(1))
        return program.as_text().count("stablehlo.dot_general")

    assert products(5) == products(3)


def test_full_rematerialisation_keeps_less():
    _, module, params = pair("xls-r", num_hidden_layers=6)
    values, mask = batch()

    def kept(policy):
        other = module.clone(remat_policy=policy)

        def loss(params):
            return other.apply(params, values, mask).logits.sum()

        _, pull_back = jax.vjp(loss, params)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(pull_back))

    assert kept("full") < 0.5 * kept("none")


# Initial parameters


@pytest.mark.parametrize("name", ["xls-r", "base"])
def test_initial_parameters_have_pytorchs_names_shapes_and_spread(name):
    architecture, own = MODELS[name]
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 128,
        "conv_dim": [64, 96, 128],
        "vocab_size": 60,
        "initializer_range": 0.05,
    }
    config = small_torch.config(architecture, **own, **sizes)
    torch.manual_seed(0)
    built = transformers.Wav2Vec2ForCTC(config)
    theirs = flat(convert.params_from_torch(small_torch.tensors(built), config, head=True))
    values, _ = batch()
    module = wav2vec2.Wav2Vec2ForCTCModule(config)
    ours = flat(jax.jit(module.init)(jax.random.key(0), values)["params"])
    assert {key: leaf.shape for key, leaf in ours.items()} == {
        key: leaf.shape for key, leaf in theirs.items()
    }
    for key, expected in theirs.items():
        assert ours[key].dtype == jnp.float32
        if "pos_conv_embed/conv/weight" in key:
            continue
        # five standard errors of a sampled deviation and of a sampled mean, twice
        spread = 5.0 * np.sqrt(2.0 / expected.size) + 1e-6
        np.testing.assert_allclose(ours[key].std(), expected.std(), rtol=spread, err_msg=key)
        error = 5.0 * np.sqrt(2.0 / expected.size) * expected.std() + 1e-6
        np.testing.assert_allclose(ours[key].mean(), expected.mean(), atol=error, err_msg=key)
        if expected.std() > 0:
            top = np.abs(ours[key]).max() / np.abs(expected).max()
            assert 0.5 < top < 2.0, key
    # transformers' initialiser writes to a copy of the weight-normed kernel, which keeps torch's
    # default; ours is what it says: deviation 2 / sqrt(taps * channels), norm equal to direction's
    v = ours["wav2vec2/encoder/pos_conv_embed/conv/weight_v"]
    g = ours["wav2vec2/encoder/pos_conv_embed/conv/weight_g"]
    taps = config.num_conv_pos_embeddings
    assert v.std() == pytest.approx(2.0 / np.sqrt(taps * config.hidden_size), rel=0.03)
    np.testing.assert_allclose(positional.weight_norm(g, v), v, rtol=1e-5)


# Refusals


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "wav2vec2-conformer"),
        ("add_adapter", True),
        ("adapter_attn_dim", 16),
        ("feat_extract_norm", "batch"),
        ("hidden_act", "prelu"),
        ("feat_extract_activation", "swoosh"),
        ("num_attention_heads", 7),
        ("num_conv_pos_embedding_groups", 5),
        ("conv_kernel", [10, 3]),
        ("hidden_dropout", 10.0),
        ("layerdrop", -0.1),
        ("mask_time_prob", 65.0),
        ("mask_time_length", 0),
        ("mask_time_min_masks", -1),
        ("num_hidden_layers", -1),
        ("num_conv_pos_embeddings", 0),
        ("num_feat_extract_layers", 5),
        ("intermediate_size", 0),
        ("layer_norm_eps", -1e-5),
        ("layer_norm_eps", float("nan")),
        ("initializer_range", -0.02),
        ("vocab_size", None),
    ],
)
def test_an_unsupported_configuration_is_refused_by_its_key(key, value):
    config = small_torch.config()
    object.__setattr__(config, key, value)
    values, _ = batch()
    with pytest.raises(errors.ModelError, match=key):
        wav2vec2.Wav2Vec2ForCTCModule(config).init(jax.random.key(0), values)


def test_channel_masks_that_no_channels_have_room_for_are_refused():
    config = small_torch.config(mask_feature_length=10_000, mask_feature_prob=0.0)
    wav2vec2.check(config)
    object.__setattr__(config, "mask_feature_prob", 0.1)
    with pytest.raises(errors.ModelError, match="mask_feature_length: 10000 is more than hidden"):
        wav2vec2.check(config)


@pytest.mark.parametrize(("attribute", "value"), [("remat_policy", "some"), ("attention", "flash")])
def test_an_unknown_attribute_is_refused_with_what_it_can_be(attribute, value):
    module = wav2vec2.Wav2Vec2ForCTCModule(small_torch.config(), **{attribute: value})
    values, _ = batch()
    with pytest.raises(errors.ModelError, match=rf"model\.{attribute}: '{value}' is not one of"):
        module.init(jax.random.key(0), values)


def test_a_strided_convolution_equals_pytorchs():
    rng = np.random.default_rng(0)
    for times, taps, stride, channels in (
        (50, 10, 5, 1),
        (33, 3, 2, 4),
        (20, 2, 2, 3),
        (9, 4, 7, 2),
    ):
        x = rng.normal(size=(2, times, channels)).astype(np.float32)
        kernel = rng.normal(size=(taps, channels, 6)).astype(np.float32)
        upstream_frames = (times - taps) // stride + 1
        upstream = rng.normal(size=(2, upstream_frames, 6)).astype(np.float32)
        y, pull_back = jax.vjp(
            lambda x, k, stride=stride: feature_encoder.strided_convolution(x, k, stride),
            x,
            kernel,
        )
        tensor = torch.tensor(x.transpose(0, 2, 1)).requires_grad_()
        weight = torch.tensor(kernel.transpose(2, 1, 0).copy()).requires_grad_()
        other = torch.nn.functional.conv1d(tensor, weight, stride=stride)
        other.backward(torch.tensor(upstream.transpose(0, 2, 1)))
        x_gradient, kernel_gradient = pull_back(upstream)
        close(y, other.detach().numpy().transpose(0, 2, 1), 2e-6)
        close(x_gradient, tensor.grad.numpy().transpose(0, 2, 1), 2e-6)
        close(kernel_gradient, weight.grad.numpy().transpose(2, 1, 0), 2e-6)


def test_a_bias_is_rounded_before_it_is_added_but_not_on_tpu():
    rng = np.random.default_rng(0)
    product = jnp.asarray(rng.normal(size=(3, 5, 64)), jnp.bfloat16)
    bias = jnp.asarray(rng.normal(size=64), jnp.float32)
    rounded = product + bias.astype(jnp.bfloat16)
    exact = np.asarray(product, np.float64) + np.asarray(bias, np.float64)
    np.testing.assert_array_equal(layers.plus_bias(product, bias), rounded)
    np.testing.assert_array_equal(layers._exact_sum(product, bias), exact.astype(jnp.bfloat16))
    assert (exact.astype(jnp.bfloat16) != rounded).any()

    def added(platform):
        lowered = jax.jit(layers.plus_bias).trace(product, bias)
        text = lowered.lower(lowering_platforms=(platform,)).as_text()
        return [line.split("x")[-1] for line in text.splitlines() if "stablehlo.add" in line]

    assert added("cpu") == added("cuda") == ["bf16>"]
    assert added("tpu") == ["f32>"]


def test_the_norm_of_a_branch_has_the_gradients_of_layer_norm():
    rng = np.random.default_rng(0)
    x, scale, bias, *weights = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((2, 9, 64), 64, 64, (2, 9, 64), (2, 9, 64))
    )
    x = (x * 3 + 1).astype(jnp.bfloat16)
    params = {"params": {"scale": scale, "bias": bias}}

    def loss(norm, params, x):
        normed, beside = norm(params, x)
        return sum((a * w).sum() for a, w in zip((normed, beside), weights, strict=True))

    def exact(params, x):
        return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False).apply(params, x), x

    def ours(params, x):
        made = layers.norm_beside(jnp.bfloat16, "norm", 1e-5)
        return made.apply(params, x)

    def parts(params, x):
        made = layers.layer_norm(jnp.bfloat16, "norm", 1e-5)
        return made.apply(params, x), x

    def error(found, expected):
        found, expected = (np.asarray(a, np.float32) for a in (found, expected))
        return abs(found - expected).max() / abs(expected).max()

    expected = jax.grad(loss, (1, 2))(exact, params, x.astype(jnp.float32))
    found = jax.grad(loss, (1, 2))(ours, params, x)
    usual = jax.grad(loss, (1, 2))(parts, params, x)
    assert error(ours(params, x)[0], exact(params, x.astype(jnp.float32))[0]) < 2**-8
    for f, u, e in zip(*map(jax.tree.leaves, (found, usual, expected)), strict=True):
        assert error(f, e) <= max(error(u, e), 2**-8)
