import json
import logging
import re
import shutil
from contextlib import nullcontext

import flax
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import small_torch
import torch
import transformers
from flax import serialization, traverse_util

import flax_asr
from flax_asr import FlaxWav2Vec2ForCTC, FlaxWav2Vec2Model, errors, origins
from flax_asr.config import ModelConfig
from flax_asr.models import api, convert, hub, outputs, pretrained, wav2vec2, weights

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Frames of 2000 samples: 399, 199, 99.
SAMPLES, FRAMES = 2000, 99


@pytest.fixture(scope="module")
def built():
    return small_torch.model("Wav2Vec2ForCTC", small_torch.config())


@pytest.fixture(scope="module")
def folder(built, tmp_path_factory):
    place = tmp_path_factory.mktemp("ctc")
    built.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model(folder):
    return FlaxWav2Vec2ForCTC.from_pretrained(folder)


@pytest.fixture(scope="module")
def batch():
    lengths = np.array([SAMPLES, 1300])
    mask = (np.arange(SAMPLES) < lengths[:, None]).astype(np.int32)
    audio = np.random.default_rng(0).normal(size=(2, SAMPLES)).astype(np.float32)
    return audio * mask.astype(np.float32), mask


def _theirs(torch_model, batch, **options):
    audio, mask = (torch.from_numpy(array) for array in batch)
    with torch.no_grad():
        return torch_model.eval()(audio, attention_mask=mask.long(), **options)


def _real(batch, values):
    """The numbers at real frames, where both sides must agree."""
    frames = np.arange(values.shape[1])
    lengths = wav2vec2.frame_lengths(small_torch.config(), batch[1].sum(-1))
    return np.asarray(values)[frames < lengths[:, None]]


def _agrees(ours, theirs, batch, atol=1e-4):
    np.testing.assert_allclose(_real(batch, ours), _real(batch, theirs.numpy()), atol=atol)


def _equal(one, other):
    same = jax.tree.map(np.array_equal, one, other)
    return all(jax.tree.leaves(same))


# Every form of checkpoint gives PyTorch's logits.


def _save_safetensors(place, torch_model):
    torch_model.save_pretrained(place)


def _save_sharded(place, torch_model):
    torch_model.save_pretrained(place, max_shard_size="10KB")


def _save_bin(place, torch_model):
    torch_model.config.save_pretrained(place)
    torch.save(torch_model.state_dict(), place / weights.TORCH)


def _save_old_names(place, torch_model):
    torch_model.config.save_pretrained(place)
    old = {}
    for key, value in torch_model.state_dict().items():
        key = key.replace("parametrizations.weight.original0", "weight_g")
        old[key.replace("parametrizations.weight.original1", "weight_v")] = value
    torch.save(old, place / weights.TORCH)


def _save_msgpack(place, torch_model):
    torch_model.config.save_pretrained(place)
    tensors = small_torch.tensors(torch_model)
    params = convert.params_from_torch(tensors, torch_model.config, head=True)
    (place / weights.MSGPACK).write_bytes(serialization.to_bytes(params))


@pytest.mark.parametrize(
    "save", [_save_safetensors, _save_sharded, _save_bin, _save_old_names, _save_msgpack]
)
def test_logits_equal_pytorchs_from_every_form(save, built, batch, tmp_path):
    save(tmp_path, built)
    model = FlaxWav2Vec2ForCTC.from_pretrained(tmp_path, from_pt=True)
    ours = model(batch[0], attention_mask=batch[1]).logits
    _agrees(ours, _theirs(built, batch).logits, batch)


@pytest.mark.parametrize("architecture", small_torch.ARCHITECTURES)
def test_logits_equal_pytorchs_for_every_architecture_both_ways(architecture, batch, tmp_path):
    there = small_torch.model("Wav2Vec2ForCTC", small_torch.config(architecture))
    there.save_pretrained(tmp_path / "torch")
    model = FlaxWav2Vec2ForCTC.from_pretrained(tmp_path / "torch")
    ours = model(batch[0], attention_mask=batch[1]).logits
    _agrees(ours, _theirs(there, batch).logits, batch)

    model.save_pretrained(tmp_path / "ours")
    back = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "ours")
    for key, value in there.state_dict().items():
        assert torch.equal(value, back.state_dict()[key]), key
    _agrees(ours, _theirs(back, batch).logits, batch)


def test_the_model_without_head_gives_pytorchs_states(folder, built, batch):
    model = FlaxWav2Vec2Model.from_pretrained(folder)
    out = model(batch[0], batch[1], output_hidden_states=True, output_attentions=True)
    theirs = _theirs(built.wav2vec2, batch, output_hidden_states=True)
    _agrees(out.last_hidden_state, theirs.last_hidden_state, batch)
    _agrees(out.extract_features, theirs.extract_features, batch)
    assert len(out.hidden_states) == len(theirs.hidden_states) == 3
    assert [a.shape for a in out.attentions] == [(2, 4, FRAMES, FRAMES)] * 2
    assert "lm_head" not in model.params
    assert "encoder" in model.params


def test_a_half_precision_checkpoint_loads_as_float32_and_is_saved_as_float32(tmp_path):
    half = small_torch.model("Wav2Vec2ForCTC", small_torch.config()).half()
    half.save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "float16"
    model = FlaxWav2Vec2ForCTC.from_pretrained(tmp_path / "half")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    model.save_pretrained(tmp_path / "ours")
    back = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "ours")
    assert back.dtype == torch.float32


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_parameters_in_half_precision_are_saved_as_they_are(model, name, tmp_path):
    half = {"bfloat16": model.to_bf16, "float16": model.to_fp16}[name](model.params)
    model.save_pretrained(tmp_path, params=half)
    back = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path)
    assert back.dtype == getattr(torch, name)
    saved = weights.read(tmp_path)
    assert saved.keys() == back.state_dict().keys()
    for key, tensor in back.state_dict().items():
        np.testing.assert_array_equal(saved[key].astype(np.float32), tensor.float().numpy())
    assert _equal(FlaxWav2Vec2ForCTC.from_pretrained(tmp_path).params, model.to_fp32(half))


def test_parameters_of_several_types_are_a_float32_model(model, tmp_path):
    mask = jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in str(path), model.params)
    model.save_pretrained(tmp_path, params=model.to_bf16(model.params, mask))
    assert transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path).dtype == torch.float32


# save_pretrained


def test_a_saved_folder_is_complete_and_reads_back_exactly(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Wav2Vec2ForCTC"]
    assert config["model_type"] == "wav2vec2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert _equal(FlaxWav2Vec2ForCTC.from_pretrained(tmp_path).params, model.params)
    assert model.config.architectures == ["Wav2Vec2ForCTC"]


def test_given_parameters_are_saved_instead_of_the_models_own(model, tmp_path):
    zeros = jax.tree.map(jnp.zeros_like, model.params)
    model.save_pretrained(tmp_path, params=zeros)
    assert _equal(FlaxWav2Vec2ForCTC.from_pretrained(tmp_path).params, zeros)


def test_calls_of_old_scripts_are_taken_and_uploads_are_refused(model, tmp_path):
    model.save_pretrained(
        tmp_path, params=model.params, push_to_hub=False, max_shard_size="10GB", token=None
    )
    back = FlaxWav2Vec2ForCTC.from_pretrained(
        tmp_path,
        force_download=False,
        resume_download=None,
        trust_remote_code=True,
        use_auth_token=None,
    )
    assert _equal(back.params, model.params)
    with pytest.raises(errors.ModelError, match=f"hf upload NAME {tmp_path / 'new'}"):
        model.save_pretrained(tmp_path / "new", push_to_hub=True)
    assert not (tmp_path / "new").exists()


def test_the_model_without_head_saves_pytorchs_class(folder, tmp_path):
    FlaxWav2Vec2Model.from_pretrained(folder).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Wav2Vec2Model"]
    _, report = transformers.Wav2Vec2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


# Heads


@pytest.mark.parametrize("name", ["Wav2Vec2Model", "Wav2Vec2ForPreTraining"])
def test_an_encoder_gets_a_fresh_head_and_says_so(name, tmp_path, caplog):
    there = small_torch.model(name, small_torch.config())
    there.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="flax_asr"):
        model = FlaxWav2Vec2ForCTC.from_pretrained(tmp_path, vocab_size=17)
    assert "no head; it gets a fresh CTC head for 17 tokens" in caplog.text
    assert model.config.vocab_size == 17
    head = model.params["lm_head"]
    assert head["kernel"].shape == (24, 17)
    assert 0.01 < head["kernel"].std() < 0.03
    assert not head["bias"].any()
    tensors = small_torch.tensors(there)
    encoder = convert.params_from_torch(tensors, there.config, head=False)
    assert _equal(model.params["wav2vec2"], encoder)


def test_load_keeps_the_head_or_makes_one_of_the_size_asked_for(folder, built, caplog):
    kept = pretrained.load(folder)
    assert not kept.fresh_head
    assert not caplog.records
    head = built.lm_head.weight.detach().numpy().T
    np.testing.assert_array_equal(kept.params["lm_head"]["kernel"], head)

    fresh = pretrained.load(folder, head_vocab_size=7, config_overrides={"layerdrop": 0.0}, seed=1)
    assert fresh.fresh_head
    assert "the stored head is not used" in caplog.text
    assert fresh.config.vocab_size == 7
    assert fresh.config.layerdrop == 0.0
    assert fresh.params["lm_head"]["kernel"].shape == (24, 7)
    assert _equal(fresh.params["wav2vec2"], kept.params["wav2vec2"])
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(fresh.params))
    again, other = (
        pretrained.load(folder, head_vocab_size=7, seed=seed).params["lm_head"]["kernel"]
        for seed in (1, 2)
    )
    np.testing.assert_array_equal(fresh.params["lm_head"]["kernel"], again)
    assert not np.array_equal(again, other)


def test_the_same_size_asked_for_still_gives_a_fresh_head(folder):
    assert pretrained.load(folder, head_vocab_size=11).fresh_head


def test_a_head_of_another_size_is_refused_unless_mismatches_are_ignored(folder):
    match = rf"^{re.escape(str(folder))}: .*lm_head\.weight.*\(11, 24\).*\(5, 24\)"
    with pytest.raises(errors.ModelError, match=match):
        FlaxWav2Vec2ForCTC.from_pretrained(folder, vocab_size=5)
    model = FlaxWav2Vec2ForCTC.from_pretrained(folder, vocab_size=5, ignore_mismatched_sizes=True)
    assert model.params["lm_head"]["kernel"].shape == (24, 5)


def test_tensors_that_do_not_fit_are_refused_by_their_folder_and_nothing_else_is_said(
    built, folder, tmp_path, caplog
):
    tensors = {f"model.{name}": values for name, values in small_torch.tensors(built).items()}
    shutil.copy(folder / "config.json", tmp_path)
    weights.write(tmp_path, tensors)
    for load in (
        pretrained.load,
        FlaxWav2Vec2ForCTC.from_pretrained,
        FlaxWav2Vec2Model.from_pretrained,
    ):
        with pytest.raises(errors.ModelError, match=rf"^{re.escape(str(tmp_path))}: .*missing: "):
            load(tmp_path)
    assert not caplog.records


def test_weights_that_are_no_numbers_are_refused_by_their_name(built, folder, tmp_path):
    tensors = small_torch.tensors(built)
    shutil.copy(folder / "config.json", tmp_path)
    for values, name in ((-np.inf, None), (np.nan, r"lm_head\.bias")):
        tensors["lm_head.bias"] = np.array([*tensors["lm_head.bias"][1:], values])
        weights.write(tmp_path, tensors)
        with pytest.raises(errors.ModelError, match=name) if name else nullcontext():
            pretrained.load(tmp_path)


@pytest.mark.parametrize("architecture", small_torch.ARCHITECTURES)
def test_the_modules_parameters_are_those_that_are_converted(architecture):
    config = small_torch.config(architecture)
    init = wav2vec2.Wav2Vec2ForCTCModule(config).init
    tree = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 400)))["params"]
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}
    assert shapes == convert.shapes(config, head=True)


def test_fresh_parameters_depend_on_the_seed_alone():
    config = small_torch.config()
    params = pretrained.fresh(config, 3)
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params).items()}
    assert shapes == convert.shapes(config, head=True)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
    assert _equal(params, pretrained.fresh(config, 3))
    assert not _equal(params, pretrained.fresh(config, 4))
    assert "lm_head" not in pretrained.fresh(config, 3, head=False)


# Calls, as the deleted class took them.


def test_positional_arguments_are_where_they_were(model, batch):
    audio, mask = batch
    masked = jnp.zeros((2, FRAMES), bool).at[:, 3:9].set(True)
    key = jax.random.PRNGKey(0)
    out = model(audio, mask, masked, model.params, key, False, True, True, False, False)
    assert isinstance(out, tuple)
    logits, hidden, attentions = out
    assert logits.shape == (2, FRAMES, 11)
    assert len(hidden) == 3
    assert len(attentions) == 2
    named = model(audio, attention_mask=mask, mask_time_indices=masked)
    np.testing.assert_array_equal(logits, named.logits)


def test_the_mask_indices_given_are_applied_as_in_pytorch(model, built, batch):
    audio, mask = batch
    masked = np.zeros((2, FRAMES), bool)
    masked[0, 5:20] = masked[1, 10:14] = True
    ours = FlaxWav2Vec2Model(model.config, _do_init=False)(
        audio, mask, masked, params=model.params["wav2vec2"]
    )
    theirs = _theirs(built.wav2vec2, batch, mask_time_indices=torch.from_numpy(masked))
    _agrees(ours.last_hidden_state, theirs.last_hidden_state, batch)
    plain = model(audio, mask).logits
    assert not np.allclose(plain, model(audio, mask, masked).logits, atol=1e-3)


def test_no_attention_mask_means_that_all_samples_are_real(model, batch):
    ones = np.ones_like(batch[1])
    np.testing.assert_allclose(
        model(batch[0]).logits, model(batch[0], attention_mask=ones).logits, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(SAMPLES,), (1, SAMPLES, 1), (2, 29), (2, 0)])
def test_what_is_no_batch_of_audio_is_refused_with_the_shape(model, shape):
    with pytest.raises(ValueError, match=r"\[batch samples\], with 30 samples or more") as caught:
        model(np.zeros(shape, np.float32))
    assert str(shape) in str(caught.value)
    with pytest.raises(ValueError, match=r"input_shape is .*, with 30 samples or more"):
        FlaxWav2Vec2ForCTC(model.config, input_shape=shape)


@pytest.mark.parametrize("shape", [(1, SAMPLES), (2, SAMPLES - 1), (2, FRAMES), (SAMPLES,)])
def test_a_mask_of_another_shape_than_the_audio_is_refused(model, batch, shape):
    with pytest.raises(ValueError, match=r"attention_mask has the shape .* \[batch samples\]"):
        model(batch[0], attention_mask=np.ones(shape, np.int32))
    # One column would be stretched over all frames.
    for wrong in ((2, 1), (2, SAMPLES)):
        with pytest.raises(ValueError, match=r"mask_time_indices .* \[batch frames\]"):
            model(batch[0], mask_time_indices=np.ones(wrong, bool))


@pytest.mark.parametrize("with_mask", [False, True])
def test_no_audio_gives_no_logits(model, batch, with_mask):
    audio, mask = (part[:0] for part in batch)
    result = model(audio, mask if with_mask else None, output_hidden_states=True)
    assert result.logits.shape == (0, FRAMES, 11)
    assert [state.shape[:2] for state in result.hidden_states] == [(0, FRAMES)] * 3


def test_an_option_that_does_not_exist_is_named_with_the_nearest(folder):
    with pytest.raises(TypeError, match=r"no option 'torch_dtype'\. Did you mean 'dtype'"):
        FlaxWav2Vec2ForCTC.from_pretrained(folder, torch_dtype="float16")
    with pytest.raises(TypeError, match=r"no option 'layer_dropp'\. Did you mean 'layerdrop'"):
        FlaxWav2Vec2Model.from_pretrained(folder, layer_dropp=0.0)
    with pytest.raises(TypeError, match=r"a field of the configuration: set config\.layerdrop"):
        FlaxWav2Vec2Model.from_pretrained(folder, config=small_torch.config(), layerdrop=0.0)


@pytest.mark.parametrize(
    "config",
    [None, {"hidden_size": 32}, "a/folder", transformers.Wav2Vec2Config, transformers.BertConfig()],
)
def test_what_is_no_configuration_is_refused_with_what_is(config):
    for make in (FlaxWav2Vec2ForCTC, FlaxWav2Vec2Model):
        with pytest.raises(TypeError, match=r"must be a transformers\.Wav2Vec2Config") as refusal:
            make(config)
        assert f"{config!r:.60}" in str(refusal.value)
        assert f"{make.__name__}.from_pretrained(NAME)" in str(refusal.value)


def test_the_shortest_audio_gives_a_frame(model):
    assert model(np.ones((1, 30), np.float32)).logits.shape == (1, 1, 11)


def test_training_applies_dropout_and_evaluation_does_not(model, batch):
    keys = jax.random.split(jax.random.PRNGKey(0))
    evaluated = model(*batch).logits
    np.testing.assert_array_equal(evaluated, model(*batch, dropout_rng=keys[0]).logits)
    first, again, other = (
        model(*batch, dropout_rng=key, train=True).logits for key in (keys[0], keys[0], keys[1])
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-3)
    assert not np.allclose(first, evaluated, atol=1e-3)


def test_training_draws_no_masks(folder, batch):
    still = {name: 0.0 for name in small_torch.config().to_dict() if name.endswith("_dropout")}
    model = FlaxWav2Vec2ForCTC.from_pretrained(
        folder, layerdrop=0.0, mask_time_prob=0.9, mask_feature_prob=0.9, **still
    )
    trained = model(*batch, dropout_rng=jax.random.PRNGKey(0), train=True).logits
    np.testing.assert_array_equal(trained, model(*batch).logits)


def test_a_frozen_feature_encoder_changes_gradients_only(model, batch):
    def loss(params, freeze):
        out = model(*batch, params=params, freeze_feature_encoder=freeze)
        return jnp.square(out.logits).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (free, gradients), (frozen, still) = (value_and_grad(model.params, f) for f in (False, True))
    assert free == frozen
    encoder = [tree["wav2vec2"].pop("feature_extractor") for tree in (gradients, still)]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(encoder[0]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(encoder[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients, still)


def test_a_model_is_exported_for_any_number_of_clips(model, batch):
    audio, mask = batch
    clips = jax.export.symbolic_shape(f"clips, {SAMPLES}")
    program = jax.export.export(jax.jit(lambda a, m: model(a, attention_mask=m).logits))(
        jax.ShapeDtypeStruct(clips, jnp.float32), jax.ShapeDtypeStruct(clips, jnp.int32)
    )
    expected = model(audio, attention_mask=mask).logits
    np.testing.assert_allclose(program.call(audio, mask), expected, atol=1e-5)


def test_results_pass_through_jit_and_carry_names_and_numbers(model, batch):
    run = jax.jit(lambda params, audio, mask: model(audio, mask, params=params))
    out = run(model.params, *batch)
    assert isinstance(out, outputs.FlaxCausalLMOutput)
    np.testing.assert_allclose(out.logits, model(*batch).logits, atol=1e-5)
    assert out["logits"] is out[0] is out.logits
    assert out[:1] == out.to_tuple() == (out.logits,)
    assert list(out) == list(out.keys()) == ["logits"]
    assert out.hidden_states is None
    assert "hidden_states" not in out
    assert len(out) == 1
    with pytest.raises(KeyError):
        out["attentions"]


def test_the_configuration_decides_what_is_returned_unless_the_call_does(folder, batch):
    model = FlaxWav2Vec2ForCTC.from_pretrained(folder, output_hidden_states=True)
    assert len(model(*batch).hidden_states) == 3
    assert model(*batch, output_hidden_states=False).hidden_states is None


def test_dtype_is_of_the_computation_and_parameters_stay_float32(folder, model, batch):
    half = FlaxWav2Vec2ForCTC.from_pretrained(folder, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("float32")}
    states = half(*batch, output_hidden_states=True).hidden_states
    assert states[-1].dtype == jnp.bfloat16
    difference = np.abs(np.asarray(half(*batch).logits - model(*batch).logits)).max()
    assert 0 < difference < 0.1


def test_lengths_of_frames_are_pytorchs(model, built):
    lengths = np.array([30, 1300, 2000])
    theirs = built._get_feat_extract_output_lengths(torch.from_numpy(lengths)).numpy()
    np.testing.assert_array_equal(model._get_feat_extract_output_lengths(lengths), theirs)
    assert model._get_feat_extract_output_lengths(SAMPLES) == FRAMES


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_lengths_without_a_sign_are_lengths_too(model, array):
    lengths = array([0, 5, 1300], np.uint32)  # as the sum of a mask of uint8
    frames = model._get_feat_extract_output_lengths(lengths)
    signed = model._get_feat_extract_output_lengths(np.array([0, 5, 1300]))
    np.testing.assert_array_equal(frames, signed)
    assert signed[:2].tolist() == [0, 0]


# Construction and parameters, as the deleted class had them.


def test_the_constructor_makes_random_weights_from_the_seed():
    config = small_torch.config()
    one, two = (FlaxWav2Vec2ForCTC(config, input_shape=(1, 512), seed=s) for s in (0, 1))
    assert not _equal(one.params, two.params)
    assert _equal(one.params, FlaxWav2Vec2ForCTC(config).params)
    assert one.config is config
    assert isinstance(one.module, wav2vec2.Wav2Vec2ForCTCModule)
    assert (
        FlaxWav2Vec2ForCTC(config, _do_init=False, remat_policy="full").module.remat_policy
        == "full"
    )


def test_without_initialisation_parameters_live_outside(folder, model, batch):
    bare, params = FlaxWav2Vec2ForCTC.from_pretrained(folder, _do_init=False)
    assert _equal(params, model.params)
    with pytest.raises(ValueError, match="_do_init=False"):
        _ = bare.params
    with pytest.raises(ValueError, match="_do_init=False"):
        bare.params = params
    logits = bare(*batch, params=params).logits
    np.testing.assert_array_equal(logits, model(*batch).logits)
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert jax.tree.map(lambda leaf: leaf.shape, bare.params_shape_tree) == shapes


def test_init_weights_fills_what_is_missing(model):
    key = jax.random.PRNGKey(5)
    encoder_only = {"wav2vec2": model.params["wav2vec2"]}
    filled = model.init_weights(key, (1, 1024), params=encoder_only)
    assert _equal(filled["wav2vec2"], model.params["wav2vec2"])
    random = model.init_weights(key, (1, 1024))
    traced = jax.eval_shape(lambda key: model.init_weights(key, (1, 1024)), key)
    assert jax.tree.structure(traced) == jax.tree.structure(random)
    assert _equal(filled["lm_head"], random["lm_head"])
    assert not _equal(random["wav2vec2"], model.params["wav2vec2"])


def test_params_with_something_missing_are_refused_by_name(folder):
    model = FlaxWav2Vec2ForCTC.from_pretrained(folder)
    incomplete = {"wav2vec2": model.params["wav2vec2"]}
    with pytest.raises(ValueError, match="lm_head/bias, lm_head/kernel"):
        model.params = incomplete
    model.params = flax.core.freeze(jax.tree.map(jnp.zeros_like, model.params))
    assert isinstance(model.params, dict)
    assert not np.any(model.params["lm_head"]["kernel"])


def test_parameters_can_be_cast_in_part(model):
    mask = traverse_util.path_aware_map(lambda path, _: path[-1] == "kernel", model.params)
    cast = model.to_bf16(model.params, mask)
    assert cast["lm_head"]["kernel"].dtype == jnp.bfloat16
    assert cast["lm_head"]["bias"].dtype == jnp.float32
    assert model.to_fp16(model.params)["lm_head"]["bias"].dtype == jnp.float16
    assert model.to_bf16({"count": jnp.arange(3)})["count"].dtype == jnp.int32
    assert model.to_fp32(cast)["lm_head"]["kernel"].dtype == jnp.float32
    frozen = model.to_bf16(flax.core.freeze(model.params), mask)
    jax.tree.map(np.testing.assert_array_equal, frozen, cast)


def test_a_configuration_given_is_used_as_it_is(folder):
    config = small_torch.config(layerdrop=0.25)
    model = FlaxWav2Vec2ForCTC.from_pretrained(folder, config=config)
    assert model.config is config
    assert FlaxWav2Vec2ForCTC.from_pretrained(folder, config=folder).config.layerdrop == 0.1


# Refusals


def test_folders_that_hold_no_wav2vec2_model_are_named(tmp_path):
    with pytest.raises(errors.ModelError, match=r"has no config\.json"):
        pretrained.load(tmp_path)
    for content, match in {
        '{"model_type": "hubert"}': "type 'hubert'; only 'wav2vec2'",
        "{}": "type None; only 'wav2vec2'",
        "[]": r"config\.json cannot be read: it holds a list",
        "{": r"config\.json cannot be read: Expecting property name",
        '{"model_type": "wav2vec2", "hidden_size": "big"}': r"config\.json: .*hidden_size",
        '{"model_type": "wav2vec2", "adapter_attn_dim": 16}': f"^{re.escape(str(tmp_path))}: model"
        " configuration: adapter_attn_dim: 16 .* take a model without them",
        '{"model_type": "wav2vec2"}': "holds no weights",
    }.items():
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(errors.ModelError, match=match):
            pretrained.load(tmp_path)


def test_the_folder_of_a_run_leads_to_its_export(folder, tmp_path):
    (tmp_path / "export").symlink_to(folder)
    with pytest.raises(errors.ModelError, match=f"Its model is in {tmp_path / 'export'}"):
        FlaxWav2Vec2ForCTC.from_pretrained(tmp_path)


def test_overrides_that_are_no_fields_or_of_another_type_are_named(folder):
    with pytest.raises(errors.ConfigError, match=r"model\.config\.mask_time_prb.*mask_time_prob\?"):
        pretrained.load(folder, config_overrides={"mask_time_prb": 0.1})
    with pytest.raises(errors.ConfigError, match=r"model\.config\.mask_time_prob: 'much'"):
        pretrained.load(folder, config_overrides={"mask_time_prob": "much"})
    with pytest.raises(errors.ConfigError, match="ctc_loss_reduction: 'maen' is neither 'mean'"):
        pretrained.load(folder, config_overrides={"ctc_loss_reduction": "maen"})
    with pytest.raises(TypeError, match="mask_time_prb"):
        FlaxWav2Vec2ForCTC.from_pretrained(folder, mask_time_prb=0.1)


def test_the_hubs_commit_is_recorded(folder, monkeypatch):
    monkeypatch.setattr(hub, "resolve", lambda name, with_weights: (folder, "abc"))
    found = origins.read(ModelConfig(pretrained="someone/model"))
    assert (found.folder, found.facts["revision"]) == (folder, "abc")


def test_the_public_names_are_these_classes():
    assert flax_asr.FlaxWav2Vec2ForCTC is api.FlaxWav2Vec2ForCTC
    assert flax_asr.FlaxWav2Vec2Model is api.FlaxWav2Vec2Model
