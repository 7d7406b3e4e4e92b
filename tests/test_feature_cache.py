"""The frozen layers' output is computed once: the same training, and never from something stale."""

import dataclasses
import functools
import logging
import shutil

import jax
import numpy as np
import pytest
import small_training
import transformers

from flax_asr import (
    assembly,
    batch_size,
    config,
    criterion,
    errors,
    feature_cache,
    inventory,
    origins,
    parallel,
    step,
)
from flax_asr.data import features, loader

QUIET = dict.fromkeys(
    "hidden_dropout attention_dropout activation_dropout feat_proj_dropout layerdrop"
    " mask_time_prob mask_feature_prob".split(),
    0.0,
)
OPTIONS = [
    "--data.cache_features=true",
    "--data.num_buckets=2",
    "--model.trainable_layers=1",
    "--model.config.num_hidden_layers=3",
    "--model.config.final_dropout=0.2",
    "--train.max_steps=6",
    "--train.eval_steps=6",
    "--train.save_total_limit=9",
    *(f"--model.config.{name}={value}" for name, value in QUIET.items()),
]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A corpus, and a finished run from what was kept."""
    place = small_training.Place(tmp_path_factory.mktemp("kept"))
    small_training.corpus(place.folder)
    output = place.finish(place.folder / "cached", *OPTIONS)
    assert "keeping the output of 2 layers for 16 clips" in output
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-3), ("fp16", 1e-3)]
)
def test_losses_and_parameters_are_those_without_the_cache(own, precision, tolerance):
    """In half precision too: the frames are kept as the layer above would read them."""
    options = [*OPTIONS, f"--train.mixed_precision={precision}"]
    plain, cached = (own.folder / f"{name}-{precision}" for name in ("plain", "cached"))
    own.finish(cached, *options)
    own.finish(plain, *options, "--data.cache_features=false")
    ours, theirs = small_training.log(cached), small_training.log(plain)
    assert [list(event) for event in ours] == [list(event) for event in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name, value in one.items():
            if isinstance(value, float):
                np.testing.assert_allclose(
                    value, other[name], rtol=tolerance, atol=tolerance / 10, err_msg=name
                )
            else:
                assert value == other[name], name
    ours, theirs = (small_training.state(run, 6) for run in (cached, plain))
    assert ours.keys() == theirs.keys()
    for name in ours:
        # The key's bias moves no score: its gradient is rounding, which AdamW makes a step of.
        rounding = precision != "fp32" and name.endswith("k_proj/bias")
        if name.startswith(("trainable", "frozen")) and not rounding:
            one, other = (np.frombuffer(state[name], np.float32) for state in (ours, theirs))
            np.testing.assert_allclose(one, other, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_and_computes_nothing_again(own):
    run = own.folder / "killed"
    process = own.start(run, *OPTIONS)
    process.wait_for(lambda: 3 in inventory.steps(run))
    process.kill()
    output = own.finish(run, *OPTIONS)
    assert "going on after update" in output
    assert "keeping" not in output
    small_training.assert_same(run, own.folder / "cached")


class Small:
    """A run before its first update, in this process."""

    def __init__(self, place, folder):
        asked = config.build({}, place.command(folder / "run", *OPTIONS)[1:])
        data = dataclasses.replace(asked.data, prepared_dir=str(folder / "prepared"))
        devices = parallel.Devices()
        cfg = batch_size.resolve(dataclasses.replace(asked, data=data), devices.count)
        self.made = assembly.Assembly(cfg, devices, None)
        self.state = self.made.initial_state()

    def kept(self):
        return self.made.cached_features(self.state)

    def frames(self):
        """Of every row."""
        kept = self.kept()
        return [kept.frames(row) for row in range(len(self.made.corpus.train))]


@pytest.fixture(scope="module")
def small(own, tmp_path_factory):
    """With parts of a few clips."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "PART_BYTES", 4096)
        yield Small(own, tmp_path_factory.mktemp("small"))


def test_what_is_kept_is_what_the_model_gives_of_each_clip(small):
    data, objective = small.made.corpus.train, small.made.objective
    assert len(small.kept().parts) > 2
    params = {**small.state.trainable, **small.state.frozen}
    tree = jax.device_get(step.merge(params, {}))
    frames = small.frames()
    for row in (int(data.samples.argmin()), int(data.samples.argmax())):
        batch = loader.assemble(data, np.array([row]), int(data.samples[row]), 16)
        audio = criterion.waveform(criterion.Batch(*batch), objective.do_normalize)
        whole = jax.jit(functools.partial(objective.module.apply, output_hidden_states=True))(
            {"params": tree}, audio
        )
        np.testing.assert_allclose(frames[row], whole.hidden_states[2][0], rtol=0, atol=1e-5)


def test_an_interrupted_pass_goes_on_with_the_part_that_is_missing(small):
    before = small.frames()
    folder = small.kept().folder
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    (folder / "seal.json").unlink()
    (folder / "part-00001.bin").unlink()
    for one, other in zip(small.frames(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    assert {name for name in times if after[name] != times[name]} == {"part-00001.bin"}


def test_damage_is_noticed_and_mended(small, caplog):
    before = [frames.copy() for frames in small.frames()]
    part = small.kept().folder / "part-00001.bin"
    damaged = bytearray(part.read_bytes())
    damaged[100] ^= 1
    part.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        after = small.frames()
    assert f"{part} has changed since it was written (sha256)" in caplog.text
    for one, other in zip(after, before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("path", "again"),
    [
        ("wav2vec2/encoder/layers/1/feed_forward/output_dense/bias", True),
        ("wav2vec2/feature_projection/projection/bias", True),
        ("wav2vec2/encoder/layers/2/feed_forward/output_dense/bias", False),
        ("wav2vec2/encoder/layer_norm/bias", False),
        ("lm_head/bias", False),
    ],
)
def test_other_weights_below_are_other_features(small, monkeypatch, path, again):
    folder = small.kept().folder
    part = "frozen" if path in small.state.frozen else "trainable"
    own = getattr(small.state, part)
    moved = small.state.replace(**{part: own | {path: own[path] + 1}})
    monkeypatch.setattr(feature_cache, "_compute", lambda *arguments: None)
    monkeypatch.setattr(features.Features, "open", lambda kept: None)
    assert (small.made.cached_features(moved).folder != folder) == again


@pytest.mark.parametrize(
    "changes",
    [
        {"module": {"dtype": jax.numpy.bfloat16}},
        {"do_normalize": False},
        {"lower_layers": 1},
        {},
    ],
)
def test_another_precision_or_model_makes_other_features(small, changes):
    objective = small.made.objective
    changed = dict(changes)
    if "module" in changes:
        changed["module"] = objective.module.clone(**changes["module"])
    params = {**small.state.trainable, **small.state.frozen}
    found = [
        feature_cache._about(given, small.made.corpus.train, params)
        for given in (objective, objective.replace(**changed))
    ]
    assert (found[0] != found[1]) == bool(changes)


def test_room_is_looked_for_before_anything_is_computed(small, monkeypatch, tmp_path):
    def no_room(kept):
        raise errors.DataError("no room")

    monkeypatch.setattr(features.Features, "check_room", no_room)
    monkeypatch.setattr(feature_cache.compilation, "compile_all", lambda *arguments: 1 / 0)
    monkeypatch.setattr(feature_cache.prepared_dir, "folder", lambda cfg: tmp_path)
    with pytest.raises(errors.DataError, match="no room"):
        small.made.cached_features(small.state)


def test_too_little_room_is_said_before_the_first_clip(tmp_path):
    old = tmp_path / "features-old"
    old.mkdir()
    (old / "part-00000.bin").write_bytes(bytes(20_000_000))
    folder = tmp_path / "features-new"
    folder.mkdir()
    kept = features.Features(folder, np.array([2**40]), lambda samples: samples, 1024, np.float32)
    with pytest.raises(
        errors.DataError, match=r"needs 4503599.63 GB in .*, where .* GB are free"
    ) as refusal:
        kept.check_room()
    assert f"{old} holds 0.02 GB of other settings: delete it" in str(refusal.value)


def test_features_of_other_settings_stay_and_are_named(small, caplog):
    folder = small.kept().folder
    old = folder.with_name("features-old")
    old.mkdir()
    (old / "part-00000.bin").write_bytes(bytes(10))
    with caplog.at_level(logging.INFO):
        assert small.kept().folder == folder
    assert f"{old} holds 0.00 GB of features of other settings" in caplog.text
    assert f"{folder} holds" not in caplog.text
    shutil.rmtree(old)


def start(**changes):
    model = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, **QUIET}
    model_config = transformers.Wav2Vec2Config(**model | changes.get("model", {}))
    told = changes.get("use_attention_mask", True)
    return origins.Origin(model_config, None, None, True, told, {})


def asked(options):
    """A configuration that keeps features, with these options."""
    named = {"data.cache_features": "true", "model.trainable_layers": "2", **options}
    return config.build({}, [f"--{name}={value}" for name, value in named.items()])


def test_features_are_kept_where_nothing_below_is_random():
    feature_cache.check(asked({"model.freeze_encoder_steps": "3"}), start())
    loud = start(model={"hidden_dropout": 0.1, "feat_extract_norm": "group"})
    feature_cache.check(asked({"data.cache_features": "false"}), loud)


@pytest.mark.parametrize(
    ("options", "changes", "hosts", "message"),
    [
        ({"model.trainable_layers": "null"}, {}, 1, "set model.trainable_layers"),
        ({"data.augment.speed": "[0.9,1.1]"}, {}, 1, "cannot be used with data.augment"),
        ({}, {}, 2, "works on one host, not on 2"),
        ({}, {"model": {"feat_extract_norm": "group"}}, 1, "convolutions have layer norm"),
        ({}, {"use_attention_mask": False}, 1, "return_attention_mask false"),
        (
            {},
            {"model": {"hidden_dropout": 0.1, "mask_time_prob": 0.05}},
            1,
            "hidden_dropout 0.1, mask_time_prob 0.05. Without them: --model.config.hidden_dropout 0"
            " --model.config.mask_time_prob 0",
        ),
        ({}, {"model": {"layerdrop": 0.1}}, 1, "layerdrop 0.1"),
    ],
)
def test_what_would_be_other_training_is_refused(options, changes, hosts, message):
    with pytest.raises(errors.ConfigError) as refusal:
        feature_cache.check(asked(options), start(**changes), hosts)
    assert str(refusal.value).startswith("data.cache_features ")
    assert message in str(refusal.value)
