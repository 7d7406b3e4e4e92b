"""Torch's tensors to our tree and back: exact to the bit, every difference named."""

import functools
import logging
import math

import ml_dtypes
import numpy as np
import pytest
import small_torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_asr import errors
from flax_asr.models import convert, weights

EMBEDDING = "wav2vec2.masked_spec_embed"
ORIGINAL = "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original"


def _tensors(name="Wav2Vec2ForCTC", config=None):
    return small_torch.tensors(small_torch.model(name, config or small_torch.config()))


def _flat(tree):
    return {"/".join(path): leaf for path, leaf in convert._leaves(tree)}


def test_adapters_are_named_as_left_over():
    config = small_torch.config(add_adapter=True)
    with pytest.raises(errors.ModelError, match=r"left over: 'wav2vec2\.adapter\.layers\.0"):
        convert.params_from_torch(_tensors(config=config), config, head=True)


@pytest.mark.parametrize("architecture", small_torch.ARCHITECTURES)
@pytest.mark.parametrize("name", ["Wav2Vec2ForCTC", "Wav2Vec2Model"])
def test_torch_to_ours_to_torch_is_exact_to_the_bit(architecture, name):
    config = small_torch.config(architecture)
    before = _tensors(name, config)
    params = convert.params_from_torch(before, config, head=name == "Wav2Vec2ForCTC")
    after = convert.torch_from_params(params, config)
    assert after.keys() == before.keys()
    for key, values in before.items():
        assert after[key].tobytes() == np.ascontiguousarray(values).tobytes(), key
        assert after[key].shape == values.shape
        assert after[key].flags.c_contiguous


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(list(small_torch.ARCHITECTURES)),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_any_bits_survive_the_way_through_our_tree_and_a_file(
    tmp_path_factory, architecture, head, seed
):
    config = small_torch.config(architecture)
    shapes = _shapes(architecture, head)
    rng = np.random.default_rng(seed)
    before = {  # NaN with all its payloads, infinities and denormal numbers too
        name: np.frombuffer(rng.bytes(4 * math.prod(shape)), np.float32).reshape(shape)
        for name, shape in shapes.items()
    }
    folder = tmp_path_factory.mktemp("weights")
    weights.write(folder, before)
    params = convert.params_from_torch(weights.read(folder), config, head=head)
    after = convert.torch_from_params(params, config)
    assert {name: values.tobytes() for name, values in after.items()} == {
        name: values.tobytes() for name, values in before.items()
    }
    assert {name: values.shape for name, values in after.items()} == shapes


@functools.cache
def _shapes(architecture, head):
    name = "Wav2Vec2ForCTC" if head else "Wav2Vec2Model"
    found = _tensors(name, small_torch.config(architecture))
    return {name: values.shape for name, values in found.items()}


def test_kernels_multiply_as_torch_layers_do():
    config = small_torch.config()
    built = small_torch.model("Wav2Vec2ForCTC", config)
    params = convert.params_from_torch(small_torch.tensors(built), config, head=True)
    hidden = np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)
    head = params["lm_head"]
    with torch.no_grad():
        logits = built.lm_head(torch.from_numpy(hidden)).numpy()
    np.testing.assert_allclose(hidden @ head["kernel"] + head["bias"], logits, atol=1e-5)

    conv = params["wav2vec2"]["feature_extractor"]["conv_layers"]["1"]["conv"]
    window = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    with torch.no_grad():
        layer = built.wav2vec2.feature_extractor.conv_layers[1].conv
        answer = layer(torch.from_numpy(window.T[None])).numpy()[0, :, 0]
    ours = np.einsum("ki,kio->o", window, conv["kernel"]) + conv["bias"]
    np.testing.assert_allclose(ours, answer, atol=1e-5)


def test_the_tree_has_the_names_of_the_deleted_class():
    config = small_torch.config(num_hidden_layers=1, conv_dim=[6, 10], conv_kernel=[3, 2],
                                conv_stride=[2, 2])  # fmt: skip
    params = convert.params_from_torch(_tensors(config=config), config, head=True)
    conv = "feature_extractor/conv_layers"
    layer = "encoder/layers/0"
    pairs = [f"{conv}/{n}/conv/{leaf}" for n in (0, 1) for leaf in ("kernel", "bias")]
    pairs += [f"{conv}/{n}/layer_norm/{leaf}" for n in (0, 1) for leaf in ("scale", "bias")]
    pairs += [f"feature_projection/layer_norm/{leaf}" for leaf in ("scale", "bias")]
    pairs += [f"feature_projection/projection/{leaf}" for leaf in ("kernel", "bias")]
    pairs += [f"encoder/pos_conv_embed/conv/{leaf}" for leaf in ("weight_g", "weight_v", "bias")]
    pairs += [
        f"{layer}/{dense}/{leaf}"
        for dense in (
            *(f"attention/{side}_proj" for side in ("q", "k", "v", "out")),
            "feed_forward/intermediate_dense",
            "feed_forward/output_dense",
        )
        for leaf in ("kernel", "bias")
    ]
    pairs += [f"{layer}/{norm}/{leaf}" for norm in ("layer_norm", "final_layer_norm")
              for leaf in ("scale", "bias")]  # fmt: skip
    pairs += ["encoder/layer_norm/scale", "encoder/layer_norm/bias", "masked_spec_embed"]
    expected = {f"wav2vec2/{name}" for name in pairs} | {"lm_head/kernel", "lm_head/bias"}
    assert set(_flat(params)) == expected
    assert _flat(params).keys() == {"/".join(p) for p in convert.shapes(config, head=True)}


def test_encoders_saved_without_prefix_or_for_pretraining_load_alike():
    config = small_torch.config()
    plain = _tensors("Wav2Vec2Model")
    with_extras = {
        **{f"wav2vec2.{key}": value for key, value in plain.items()},
        "quantizer.codevectors": np.zeros(1, np.float32),
        "quantizer.weight_proj.weight": np.zeros(1, np.float32),
        "project_q.bias": np.zeros(1, np.float32),
        "project_hid.weight": np.zeros(1, np.float32),
    }
    bare = _flat(convert.params_from_torch(plain, config, head=False))
    pretrained = _flat(convert.params_from_torch(with_extras, config, head=False))
    assert bare.keys() == pretrained.keys()
    assert all(np.array_equal(bare[key], pretrained[key]) for key in bare)


def test_pretraining_checkpoints_of_transformers_load_as_encoders():
    config = small_torch.config()
    tensors = _tensors("Wav2Vec2ForPreTraining")
    assert any(key.startswith("quantizer.") for key in tensors)
    params = convert.params_from_torch(tensors, config, head=False)
    assert "lm_head" not in params
    assert not convert.has_head(tensors)
    with pytest.raises(errors.ModelError, match=r"missing: 'lm_head\.bias', 'lm_head\.weight'"):
        convert.params_from_torch(tensors, config, head=True)


@pytest.mark.parametrize(
    "name",
    [
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2ForAudioFrameClassification",
        "Wav2Vec2ForXVector",
    ],
)
def test_classifiers_of_transformers_load_as_encoders(name):
    config = small_torch.config(use_weighted_layer_sum=True, num_labels=3)
    tensors = _tensors(name, config)
    assert {"layer_weights", "classifier.weight"} <= tensors.keys()
    params = _flat(convert.params_from_torch(tensors, config, head=False))
    assert not convert.has_head(tensors)
    assert params.keys() == {"/".join(path) for path in convert.shapes(config, head=False)}


def test_a_head_beside_an_unprefixed_encoder_is_taken():
    config = small_torch.config()
    tensors = {key.removeprefix("wav2vec2."): value for key, value in _tensors().items()}
    assert "lm_head" in convert.params_from_torch(tensors, config, head=True)


def test_both_spellings_of_the_weight_norm_load_alike():
    config = small_torch.config()
    new = _tensors()
    old = dict(new)
    base = "wav2vec2.encoder.pos_conv_embed.conv.weight_"
    old[base + "g"], old[base + "v"] = old.pop(ORIGINAL + "0"), old.pop(ORIGINAL + "1")
    ours = [_flat(convert.params_from_torch(side, config, head=True)) for side in (old, new)]
    assert all(np.array_equal(ours[0][key], ours[1][key]) for key in ours[1])
    with pytest.raises(errors.ModelError, match="under two names"):
        convert.params_from_torch({**old, **new}, config, head=True)


def test_a_missing_mask_embedding_starts_fresh_and_says_so(caplog):
    config = small_torch.config()
    tensors = _tensors()
    del tensors[EMBEDDING]
    with caplog.at_level(logging.WARNING, logger="flax_asr"):
        first = convert.params_from_torch(tensors, config, head=True)
    assert "masked_spec_embed" in caplog.text
    second = convert.params_from_torch(tensors, config, head=True)
    fresh = first["wav2vec2"]["masked_spec_embed"]
    np.testing.assert_array_equal(fresh, second["wav2vec2"]["masked_spec_embed"])
    assert fresh.shape == (24,)
    assert fresh.dtype == np.float32
    assert fresh.std() > 0.1


@pytest.mark.parametrize(("time", "feature"), [(0.0, 0.0), (0.0, 0.1), (0.1, 0.0)])
def test_the_mask_embedding_is_written_where_torch_has_it(time, feature):
    config = small_torch.config(mask_time_prob=time, mask_feature_prob=feature)
    before = _tensors(config=config)
    assert (EMBEDDING in before) == (time + feature > 0)
    params = convert.params_from_torch(before, config, head=True)
    assert convert.torch_from_params(params, config).keys() == before.keys()


def test_parameters_share_no_memory_with_the_file():
    tensors = _tensors()
    params = convert.params_from_torch(tensors, small_torch.config(), head=True)
    for values in tensors.values():
        values.fill(0)
    assert all(leaf.any() for leaf in _flat(params).values())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(dtype):
    config = small_torch.config()
    halves = {key: value.astype(dtype) for key, value in _tensors().items()}
    params = _flat(convert.params_from_torch(halves, config, head=True))
    kernel = params["lm_head/kernel"]
    assert all(leaf.dtype == np.float32 for leaf in params.values())
    np.testing.assert_array_equal(kernel, halves["lm_head.weight"].astype(np.float32).T)


def test_a_tensor_left_over_or_missing_is_named():
    config = small_torch.config()
    tensors = _tensors()
    with pytest.raises(errors.ModelError, match=r"left over: 'wav2vec2\.encoder\.surprise"):
        convert.params_from_torch(
            {**tensors, "wav2vec2.encoder.surprise": np.zeros(3, np.float32)}, config, head=True
        )
    del tensors["wav2vec2.encoder.layers.1.attention.k_proj.bias"]
    with pytest.raises(errors.ModelError, match=r"missing: .*layers\.1\.attention\.k_proj\.bias"):
        convert.params_from_torch(tensors, config, head=True)


def test_the_names_of_fairseq_are_answered_with_the_converter():
    tensors = {key.replace("attention", "self_attn"): value for key, value in _tensors().items()}
    with pytest.raises(errors.ModelError, match="have fairseq's names: convert it with"):
        convert.params_from_torch(tensors, small_torch.config(), head=True)


def test_a_configuration_with_other_layers_or_norms_is_refused():
    with pytest.raises(errors.ModelError, match=r"left over: 'wav2vec2\.encoder\.layers\.1"):
        convert.params_from_torch(_tensors(), small_torch.config(num_hidden_layers=1), head=True)
    with pytest.raises(errors.ModelError, match=r"left over: .*conv_layers\.1\.layer_norm"):
        convert.params_from_torch(_tensors(), small_torch.config("group-stable"), head=True)


def test_a_wrong_shape_names_the_tensor_and_both_shapes():
    config = small_torch.config(vocab_size=7)
    with pytest.raises(errors.ModelError, match=r"lm_head\.weight.*\(11, 24\).*\(7, 24\)"):
        convert.params_from_torch(_tensors(), config, head=True)


def test_quantised_tensors_are_refused():
    tensors = _tensors()
    tensors["lm_head.bias"] = tensors["lm_head.bias"].astype(np.int8)
    with pytest.raises(errors.ModelError, match=r"lm_head\.bias.*int8"):
        convert.params_from_torch(tensors, small_torch.config(), head=True)


def test_trees_that_do_not_fit_the_configuration_are_not_exported():
    config = small_torch.config()
    params = convert.params_from_torch(_tensors(), config, head=True)
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].T
    with pytest.raises(errors.ModelError, match=r"lm_head/kernel.*\(11, 24\).*\(24, 11\)"):
        convert.torch_from_params(params, config)
    del params["lm_head"]["bias"]
    with pytest.raises(errors.ModelError, match="missing: 'lm_head/bias'"):
        convert.torch_from_params(params, config)


def test_flax_names_become_torch_names():
    config = small_torch.config()
    before = _tensors()
    renamed = convert.torch_names(convert.params_from_torch(before, config, head=True))
    assert {key for key in renamed if "weight_" not in key} == {
        key for key in before if "parametrizations" not in key
    }
    back = convert.params_from_torch(renamed, config, head=True)
    after = convert.torch_from_params(back, config)
    assert all(np.array_equal(after[key], before[key]) for key in before)
