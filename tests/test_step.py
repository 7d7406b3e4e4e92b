"""One update against PyTorch; and what must not change it: devices, padding, filler rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import torch
import transformers
from models import small_torch

from flax_asr import optim, parallel, step
from flax_asr.models import convert

QUIET = dict.fromkeys(
    (
        "hidden_dropout attention_dropout activation_dropout feat_proj_dropout final_dropout"
        " layerdrop mask_time_prob mask_feature_prob"
    ).split(),
    0.0,
)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def _model(architecture="xls-r", **changes):
    config = small_torch.config(architecture, **{**QUIET, "ctc_loss_reduction": "mean", **changes})
    built = small_torch.model("Wav2Vec2ForCTC", config)
    params = convert.params_from_torch(small_torch.tensors(built), config, head=True)
    return config, built, params


def _torch_loss(model, batch):
    """The mean over clips of each one's loss, by transformers' own feature extractor and model."""
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    clips = [
        batch.audio[i, : batch.sample_lengths[i]].astype(np.float32) * batch.gains[i]
        for i in range(len(batch.weights))
    ]
    inputs = extractor(
        clips,
        sampling_rate=16000,
        padding="max_length",
        max_length=batch.audio.shape[1],
        return_tensors="pt",
    )
    real = np.arange(batch.labels.shape[1]) < batch.label_lengths[:, None]
    labels = torch.tensor(np.where(real, batch.labels, -100), dtype=torch.long)
    return model(inputs.input_values, attention_mask=inputs.attention_mask, labels=labels).loss


OPTIM = {"learning_rate": 3e-3, "warmup_steps": 5, "weight_decay": 0.01, "max_grad_norm": 0.5}


def _adamw(model):
    """PyTorch's, of all that is trained; weights decay as the Trainer has them."""
    kept = transformers.trainer_pt_utils.get_parameter_names(model, [torch.nn.LayerNorm])
    groups = {0.01: [], 0.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[0.01 if name in kept and "bias" not in name else 0.0].append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for decay, params in groups.items()], lr=3e-3
    )


def _fifty_groups(vocab):
    return [[small_run.batch(4, 100 * s + g, vocab) for g in range(4)] for s in range(50)]


def _torch_loop(half=False):
    """Losses and final parameters of fifty updates in PyTorch; `half` is its own bf16."""
    config, model, _ = _model()
    model.freeze_feature_encoder()
    adamw = _adamw(model)
    schedule = transformers.get_linear_schedule_with_warmup(adamw, 5, 50)
    torch_losses = []
    for update in _fifty_groups(config.vocab_size):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = [_torch_loss(model, batch) for batch in update]
        (sum(losses) / len(losses)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        torch_losses.append(sum(losses).item() / len(losses))
    params = step.flat(convert.params_from_torch(small_torch.tensors(model), config, head=True))
    return np.array(torch_losses), params


@pytest.fixture(scope="module")
def torch_loop():
    return _torch_loop()


@pytest.mark.parametrize("devices", [1, 2])
def test_fifty_updates_equal_a_pytorch_loop(torch_loop, devices):
    config, _, params = _model()
    ours = small_run.Trainer(
        small_run.objective(config), params, updates=50, devices=devices, optim=OPTIM
    )
    our_losses = [ours.update(*update).loss for update in _fifty_groups(config.vocab_size)]

    torch_losses, theirs = torch_loop
    assert torch_losses[-1] < 0.8 * torch_losses[0], "the comparison must be of a model that learns"
    np.testing.assert_allclose(our_losses, torch_losses, rtol=1e-3)
    for path, value in ours.params.items():
        # a key's bias changes nothing: its gradient is rounding noise, which Adam scales up
        if not path.endswith(("k_proj/bias", "masked_spec_embed")):
            np.testing.assert_allclose(value, theirs[path], atol=1e-4, err_msg=path)


@pytest.mark.slow
def test_fifty_updates_in_bf16_stray_no_further_than_pytorchs_own(torch_loop):
    """The tolerance is what bf16 does to PyTorch's loop, twice that for another order of rounding.

    A matrix product of bf16 numbers is off by 2^-9 a factor; how that grows over fifty updates of
    AdamW no formula says, but PyTorch's autocast suffers the same.
    """
    config, _, params = _model()
    ours = small_run.Trainer(
        small_run.objective(config, "bf16"),
        params,
        updates=50,
        mixed_precision="bf16",
        optim=OPTIM,
    )
    losses = np.array([ours.update(*u).loss for u in _fifty_groups(config.vocab_size)])
    exact, exact_params = torch_loop
    theirs, their_params = _torch_loop(half=True)
    assert np.abs(theirs / exact - 1).max() > 1e-4, "autocast is at work"
    assert np.abs(losses / exact - 1).max() > 1e-4, "so is bf16"
    assert _rms(losses / exact - 1) < 2 * _rms(theirs / exact - 1)
    assert np.abs(losses / exact - 1).max() < 0.02
    moved = {
        path: (value - exact_params[path], their_params[path] - exact_params[path])
        for path, value in ours.params.items()
        if not path.endswith(("k_proj/bias", "masked_spec_embed"))
    }
    mine, other = (np.concatenate([pair[i].ravel() for pair in moved.values()]) for i in (0, 1))
    assert _rms(mine) < 2 * _rms(other)


def _rms(values):
    return float(np.sqrt(np.square(values).mean()))


def test_an_overflow_in_one_micro_batch_skips_the_update_as_torchs_scaler_does():
    """Four micro-batches an update; in the second update one of them overflows."""
    config, model, params = _model()
    model.freeze_feature_encoder()
    # The scale of fp16 on fp32 arithmetic, so that nothing else overflows and all can be compared.
    ours = small_run.Trainer(
        small_run.objective(config), params, updates=10, mixed_precision="fp16", optim=OPTIM
    )
    adamw = _adamw(model)
    schedule = transformers.get_linear_schedule_with_warmup(adamw, 5, 10)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=2000)
    for number in range(5):
        update = [small_run.batch(4, 10 * number + g, config.vocab_size) for g in range(4)]
        given = list(update)
        if number == 1:
            given[2] = update[2]._replace(gains=np.array([np.inf, 1, 1, 1], np.float32))
        metrics = ours.update(*given)
        for place, batch in enumerate(update):
            scaler.scale(_torch_loss(model, batch) / 4).backward()
            if number == 1 and place == 2:
                model.lm_head.weight.grad[0, 0] = torch.inf
        scaler.unscale_(adamw)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        scale, rate = scaler.get_scale(), schedule.get_last_lr()[0]
        scaler.step(adamw)
        scaler.update()
        skipped = scaler.get_scale() < scale
        # As the Trainer: a skipped update leaves the schedule where it is.
        if not skipped:
            schedule.step()
        adamw.zero_grad()
        assert metrics.finite == (not skipped) == (number != 1)
        assert skipped or metrics.grad_norm == pytest.approx(norm, rel=1e-3)
        assert metrics.loss_scale == scale
        assert metrics.learning_rate == pytest.approx(rate, rel=1e-6)
    assert ours.state.loss_scale.value == scaler.get_scale() == 32768
    count = next(leaf for leaf in jax.tree.leaves(ours.state.optimiser) if leaf.ndim == 0)
    (their_count,) = {int(of_parameter["step"]) for of_parameter in adamw.state.values()}
    assert int(count) == their_count == 4
    theirs = step.flat(convert.params_from_torch(small_torch.tensors(model), config, head=True))
    for path, value in ours.params.items():
        if not path.endswith(("k_proj/bias", "masked_spec_embed")):
            np.testing.assert_allclose(value, theirs[path], atol=1e-4, err_msg=path)


@pytest.mark.parametrize("architecture", ["xls-r", "base"])
def test_loss_and_gradient_of_a_padded_batch_equal_pytorch(architecture):
    config, model, params = _model(architecture)
    batch = small_run.batch(4, 1, config.vocab_size)
    # a plain step of size 1 from a huge clipping norm: the parameters move by the gradient
    ours = _gradients(config, params, [batch], devices=2)
    loss = _torch_loss(model, batch)
    loss.backward()
    theirs = step.flat(
        convert.params_from_torch(
            {name: p.grad.numpy() for name, p in model.named_parameters()}, config, head=True
        )
    )
    np.testing.assert_allclose(ours.loss, loss.item(), rtol=1e-5)
    # torch's class has no mask embedding when nothing is masked
    assert not ours.gradients.pop("wav2vec2/masked_spec_embed").any()
    del theirs["wav2vec2/masked_spec_embed"]
    _assert_gradients(ours.gradients, theirs, 1e-3)


class _Sums:
    def __init__(self, loss, gradients):
        self.loss, self.gradients = loss, gradients


def _gradients(config, params, groups, devices=1, **changes):
    """Mean loss and gradients over the clips of these groups, everything trainable."""
    trainer = small_run.Trainer(
        small_run.objective(config, **changes),
        params,
        devices=devices,
        model={"freeze_feature_encoder": False},
    )
    for group in groups:
        per_device = len(group.weights) // devices
        for micro in trainer.devices.micro_batches(group, per_device):
            trainer.sums = trainer.accumulate(trainer.state, trainer.sums, micro)
    sums = jax.device_get(trainer.sums)
    clips = sums.clips.sum()
    return _Sums(
        sums.loss.sum() / clips, {p: g.sum(axis=0) / clips for p, g in sums.gradients.items()}
    )


def _assert_equal(a, b):
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)
    _assert_gradients(a.gradients, b.gradients, 1e-4)


def _assert_gradients(ours, expected, tolerance):
    """Relative to each tensor's largest entry, or 1e-5 of the largest of all."""
    floor = 1e-5 * max(np.abs(gradient).max() for gradient in expected.values())
    for path, gradient in ours.items():
        scale = np.abs(expected[path]).max() + floor
        np.testing.assert_allclose(
            gradient / scale, expected[path] / scale, rtol=0, atol=tolerance, err_msg=path
        )


def test_two_devices_give_the_gradients_of_one():
    config, _, params = _model()
    group = small_run.batch(8, 3, config.vocab_size)
    _assert_equal(
        _gradients(config, params, [group], devices=2), _gradients(config, params, [group])
    )


def test_four_micro_batches_give_the_gradients_of_one_batch():
    config, _, params = _model()
    groups = [small_run.batch(2, seed, config.vocab_size) for seed in range(4)]
    _assert_equal(
        _gradients(config, params, groups), _gradients(config, params, [small_run.joined(*groups)])
    )


@pytest.mark.parametrize(
    ("devices", "zero_sharding"), [(1, False), pytest.param(2, True, marks=pytest.mark.slow)]
)
def test_one_program_moves_a_single_micro_batch_as_two_programs_do(devices, zero_sharding):
    config, _, params = _model(hidden_dropout=0.2)
    objective = small_run.objective(config)
    one, two = (
        small_run.Trainer(
            objective,
            params,
            devices=devices,
            zero_sharding=zero_sharding,
            optim={**OPTIM, "ema_decay": 0.9},
        )
        for _ in range(2)
    )
    update_from = parallel.update_from(
        objective,
        two.rule,
        two.devices,
        two.layout,
    )
    for seed in range(3):
        group = small_run.batch(4, seed, config.vocab_size)
        (micro,) = two.devices.micro_batches(group, 4 // devices)
        one.state, metrics = update_from(one.state, micro)
        for ours, expected in zip(jax.device_get(metrics), two.update(group), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5)
    for ours, expected in zip(*map(jax.tree.leaves, (one.state, two.state)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_update_is_traced_once_for_programs_of_all_shapes(monkeypatch):
    config, _, params = _model()
    traced = []

    def update(*arguments, **named):
        traced.append(named)
        return original(*arguments, **named)

    original = step.update
    monkeypatch.setattr(step, "update", update)
    trainer = small_run.Trainer(small_run.objective(config), params)
    function = parallel.update_from(
        small_run.objective(config), trainer.rule, trainer.devices, trainer.layout
    )
    for samples in (1600, 2000):
        function.lower(trainer.state, trainer.devices.batch_shapes(2, samples, small_run.TOKENS))
    assert traced == [{"fresh": True}]


def test_padding_does_not_change_the_gradients():
    config, _, params = _model()
    group = small_run.batch(4, 5, config.vocab_size)
    wider = group._replace(
        audio=np.pad(group.audio, ((0, 0), (0, 1111)), constant_values=77),
        labels=np.pad(group.labels, ((0, 0), (0, 5)), constant_values=3),
    )
    _assert_equal(_gradients(config, params, [group]), _gradients(config, params, [wider]))


def test_filler_rows_do_not_change_the_gradients():
    config, _, params = _model()
    group = small_run.batch(4, 6, config.vocab_size)
    filled = small_run.joined(group, small_run.batch(4, 7, config.vocab_size, fillers=4))
    _assert_equal(_gradients(config, params, [group]), _gradients(config, params, [filled]))


@pytest.mark.parametrize("updates", [10, pytest.param(500, marks=pytest.mark.slow)])
def test_replicas_are_bit_equal_after_training(updates):
    config, _, params = _model(hidden_dropout=0.1, mask_time_prob=0.3, mask_time_length=2)
    trainer = small_run.Trainer(small_run.objective(config), params, devices=2, optim=OPTIM)
    for seed in range(updates):
        trainer.update(small_run.batch(4, seed, config.vocab_size))
    for leaf in jax.tree.leaves(trainer.state):
        first, second = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize(("bias", "share"), [(100.0, 1.0), (-100.0, 0.0)])
def test_the_share_of_blanks_is_that_of_the_real_frames(bias, share):
    config, _, params = _model()
    params["lm_head"]["bias"][config.pad_token_id] = bias
    trainer = small_run.Trainer(small_run.objective(config), params, optim=OPTIM)
    group = small_run.batch(4, 1, config.vocab_size, fillers=1)
    assert trainer.update(group).blank_fraction == share


def test_of_equally_likely_symbols_the_first_counts():
    logits = np.random.default_rng(0).integers(0, 3, (3, 50, 7)).astype(np.float32)
    logits[0, 0] = -np.inf
    np.testing.assert_array_equal(step.first_maximum(jnp.asarray(logits)), logits.argmax(-1))


def test_the_feature_encoder_has_no_optimiser_state_when_frozen():
    config, _, params = _model()
    trainer = small_run.Trainer(small_run.objective(config), params, optim=OPTIM)
    frozen = {p for p in trainer.params if p.startswith("wav2vec2/feature_extractor/")}
    assert frozen == set(trainer.state.frozen)
    before = {p: trainer.params[p] for p in frozen}
    trainer.update(small_run.batch(4, 1, config.vocab_size))
    trainer.update(small_run.batch(4, 2, config.vocab_size))
    for path in frozen:
        np.testing.assert_array_equal(trainer.params[path], before[path])
    paths = {
        getattr(key, "key", None)
        for path, _ in jax.tree_util.tree_leaves_with_path(trainer.state.optimiser)
        for key in path
    }
    assert not paths & frozen
    assert paths & set(trainer.state.trainable)


@pytest.mark.parametrize("norm_comes_last", [True, False])
def test_only_the_top_layers_train_where_asked(norm_comes_last):
    """Before the layers, the encoder's own norm is below what is trained."""
    config, _, params = _model(do_stable_layer_norm=norm_comes_last)
    trainer = small_run.Trainer(
        small_run.objective(config), params, optim=OPTIM, model={"trainable_layers": 1}
    )
    before = trainer.params
    for seed in range(3):
        trainer.update(small_run.batch(4, seed, config.vocab_size))
    moved = {p for p, value in trainer.params.items() if not np.array_equal(value, before[p])}
    assert moved == set(trainer.state.trainable)
    norm = ("wav2vec2/encoder/layer_norm/",) if norm_comes_last else ()
    begins = ("lm_head/", "wav2vec2/encoder/layers/1/", *norm)
    assert {begin for begin in begins for p in moved if p.startswith(begin)} == set(begins)
    assert all(p.startswith(begins) for p in moved)


@pytest.mark.parametrize("changes", [{"hidden_dropout": 0.5}, {"mask_time_prob": 0.5}])
def test_dropout_and_masks_differ_by_update_micro_batch_and_device(changes):
    config, _, params = _model(mask_time_length=2, **changes)
    trainer = small_run.Trainer(small_run.objective(config), params, devices=2)
    clips = small_run.batch(2, 1, config.vocab_size)
    (micro,) = trainer.devices.micro_batches(small_run.joined(clips, clips), 2)
    losses = []
    for number in range(2):
        update = trainer.state.replace(step=trainer.devices.replicate(np.int32(number)))
        sums, before = trainer.devices.zero_sums(update.trainable), 0.0
        for _ in range(2):
            sums = trainer.accumulate(update, sums, micro)
            losses += list(jax.device_get(sums.loss) - before)
            before = jax.device_get(sums.loss)
    # Far more than rounding between any two of these eight passes over the same clips.
    assert np.diff(np.sort(losses)).min() > 1e-5 * max(losses)


@pytest.mark.parametrize("mixed_precision", ["fp32", "bf16", "fp16"])
def test_parameters_moments_gradient_sums_and_average_stay_float32(mixed_precision):
    config, _, params = _model()
    trainer = small_run.Trainer(
        small_run.objective(config, mixed_precision),
        params,
        mixed_precision=mixed_precision,
        optim={**OPTIM, "ema_decay": 0.9},
    )
    # fp16 finds its scale in the first updates
    metrics = [trainer.update(small_run.batch(4, 1, config.vocab_size)) for _ in range(8)][-1]
    assert metrics.finite
    assert np.isfinite(metrics.loss)
    assert metrics.loss.dtype == metrics.grad_norm.dtype == np.dtype("float32")
    kept = (trainer.state.trainable, trainer.state.average, trainer.sums.gradients)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(kept)}
    assert kinds == {np.dtype("float32")}
    floats = {
        leaf.dtype
        for leaf in jax.tree.leaves(trainer.state.optimiser)
        if np.issubdtype(leaf.dtype, np.floating)
    }
    assert floats == {np.dtype("float32")}


@pytest.mark.parametrize("mixed_precision", ["fp32", "bf16", "fp16"])
def test_a_bad_update_changes_nothing_but_step_scale_and_counters(mixed_precision):
    config, _, params = _model()
    trainer = small_run.Trainer(
        small_run.objective(config, mixed_precision),
        params,
        mixed_precision=mixed_precision,
        optim=OPTIM,
    )
    good = small_run.batch(4, 1, config.vocab_size)
    for _ in range(8):
        trainer.update(good)
    before = jax.device_get(trainer.state)
    bad = good._replace(gains=np.array([np.inf, 1, 1, 1], np.float32))
    metrics = trainer.update(good, bad)
    after = jax.device_get(trainer.state)
    assert not metrics.finite
    for name in ("trainable", "optimiser", "frozen"):
        for a, b in zip(
            jax.tree.leaves(getattr(before, name)),
            jax.tree.leaves(getattr(after, name)),
            strict=True,
        ):
            assert a.tobytes() == b.tobytes()
    assert after.step == before.step + 1
    assert after.skipped == before.skipped + 1
    halved = mixed_precision == "fp16"
    assert after.loss_scale.value == before.loss_scale.value / (2 if halved else 1)
    assert trainer.update(good).finite


def test_a_waiting_encoder_and_a_rate_for_the_head_are_those_of_a_pytorch_loop():
    """In torch what has no gradient has no state either: its bias correction starts later."""
    config, model, params = _model()
    waits, updates = 3, 8
    ours = small_run.Trainer(
        small_run.objective(config),
        params,
        updates=updates,
        model={"freeze_encoder_steps": waits},
        optim={**OPTIM, "head_learning_rate": 1e-2},
    )
    before = ours.params
    groups = [small_run.batch(4, seed, config.vocab_size) for seed in range(updates)]

    head = {"lm_head.weight", "lm_head.bias"}
    model.freeze_feature_encoder()
    encoder = [p for n, p in model.named_parameters() if n not in head and p.requires_grad]
    kept = transformers.trainer_pt_utils.get_parameter_names(model, [torch.nn.LayerNorm])
    decayed = {id(p) for n, p in model.named_parameters() if n in kept and "bias" not in n}
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in encoder if id(p) in decayed], "weight_decay": 0.01},
            {"params": [p for p in encoder if id(p) not in decayed], "weight_decay": 0.0},
            {"params": [model.lm_head.weight], "weight_decay": 0.01, "lr": 1e-2},
            {"params": [model.lm_head.bias], "weight_decay": 0.0, "lr": 1e-2},
        ],
        lr=3e-3,
    )
    schedule = transformers.get_linear_schedule_with_warmup(adamw, 5, updates)
    for number, group in enumerate(groups):
        for parameter in encoder:
            parameter.requires_grad = number >= waits
        loss = _torch_loss(model, group)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        np.testing.assert_allclose(ours.update(group).loss, loss.item(), rtol=1e-4)
        waiting = {p for p, v in ours.params.items() if np.array_equal(v, before[p])}
        if number < waits:
            # the first update of a warm-up has rate 0
            head_too = {p for p in before if p.startswith("lm_head/") and number == 0}
            assert waiting == {p for p in before if not p.startswith("lm_head/")} | head_too
    assert waiting == set(ours.state.frozen)

    theirs = step.flat(convert.params_from_torch(small_torch.tensors(model), config, head=True))
    for path, value in ours.params.items():
        if not path.endswith(("k_proj/bias", "masked_spec_embed")):
            np.testing.assert_allclose(value, theirs[path], atol=1e-4, err_msg=path)


def test_the_moving_average_is_numpys_recursion_and_skips_what_is_skipped():
    config, _, params = _model()
    trainer = small_run.Trainer(
        small_run.objective(config), params, devices=2, optim={**OPTIM, "ema_decay": 0.7}
    )
    good = small_run.batch(4, 1, config.vocab_size)
    bad = good._replace(gains=np.array([np.inf, 1, 1, 1], np.float32))
    trained = set(trainer.state.trainable)
    expected = {path: trainer.params[path].astype(np.float64) for path in trained}
    for batch in (good, good, bad, good, good):
        finite = trainer.update(batch).finite
        for path in trained:
            if finite:
                expected[path] = 0.7 * expected[path] + 0.3 * trainer.params[path]
    average = jax.device_get(trainer.state.average)
    assert set(average) == trained
    for path, value in average.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)
    # that it is neither the last weights nor the first ones
    scored = jax.device_get(trainer.state.scored)
    assert np.abs(scored["lm_head/kernel"] - trainer.params["lm_head/kernel"]).max() > 1e-3
    assert set(scored) == set(trainer.params)
    np.testing.assert_array_equal(scored["lm_head/kernel"], average["lm_head/kernel"])


BAD_GAINS = [np.nan, np.inf, -np.inf, 3e38]


@pytest.mark.parametrize(
    ("devices", "count"), [(1, 100), (2, 60), pytest.param(1, 1000, marks=pytest.mark.slow)]
)
def test_bad_micro_batches_never_reach_the_weights(devices, count):
    config, _, params = _model()
    spoilt, quiet = (
        small_run.Trainer(small_run.objective(config), params, devices=devices, optim=OPTIM)
        for _ in range(2)
    )
    good = [small_run.batch(4, seed, config.vocab_size) for seed in range(8)]
    rng = np.random.default_rng(0)
    injected = updates = 0
    while injected < count:
        groups = [good[i] for i in rng.integers(len(good), size=4)]
        bad = rng.permutation(4)[: rng.choice([1, 4, 4, 4])]
        for place in bad:
            gains = groups[place].gains.copy()
            gains[rng.integers(4)] = rng.choice(BAD_GAINS)
            groups[place] = groups[place]._replace(gains=gains)
        injected, updates = injected + len(bad), updates + 1
        metrics = spoilt.update(*groups)
        assert not metrics.finite
        assert metrics.skipped == updates
        if updates % 20 == 0:
            wanted = quiet.update(good[updates % 8])
            assert spoilt.update(good[updates % 8]).loss == wanted.loss
    skipped, never = jax.device_get((spoilt.state, quiet.state))
    assert skipped.bad_in_a_row == updates % 20
    for name in ("trainable", "optimiser", "frozen"):
        theirs = jax.tree.leaves(getattr(never, name))
        for a, b in zip(jax.tree.leaves(getattr(skipped, name)), theirs, strict=True):
            assert a.tobytes() == b.tobytes()


def test_fp16_finds_its_scale_from_the_largest_within_24_updates():
    config, _, params = _model()
    trainer = small_run.Trainer(
        small_run.objective(config, "fp16"), params, mixed_precision="fp16", optim=OPTIM
    )
    largest = trainer.state.loss_scale.replace(value=np.float32(optim.LARGEST_LOSS_SCALE))
    trainer.state = trainer.state.replace(loss_scale=trainer.devices.replicate(largest))
    good = small_run.batch(4, 1, config.vocab_size)
    metrics = [trainer.update(good) for _ in range(25)]
    finite = [bool(update.finite) for update in metrics]
    assert not finite[0]
    assert finite[-1]
    assert all(not update.bad_in_a_row for update in metrics)
    assert metrics[-1].skipped == finite.index(True)
    assert metrics[-1].loss < metrics[finite.index(True)].loss


def test_fp16_gives_up_only_where_no_scale_helps():
    config, _, params = _model()
    trainer = small_run.Trainer(
        small_run.objective(config, "fp16"), params, mixed_precision="fp16", optim=OPTIM
    )
    bad = small_run.batch(4, 1, config.vocab_size)._replace(gains=np.full(4, np.nan, np.float32))
    counts = [int(trainer.update(bad).bad_in_a_row) for _ in range(20)]
    assert counts == [0] * 16 + [1, 2, 3, 4]


def test_the_loss_scale_doubles_after_its_interval_and_keeps_its_bounds():
    scale = optim.LossScale.create("fp16")
    for _ in range(optim.GROWTH_INTERVAL):
        scale = scale.after(jnp.bool_(True))
    assert scale.value == 2 * 65536
    for _ in range(40):
        scale = scale.after(jnp.bool_(False))
    assert scale.value == optim.SMALLEST_LOSS_SCALE


def test_a_clip_without_an_alignment_is_counted_and_costs_nothing():
    config, _, params = _model()
    group = small_run.batch(4, 1, config.vocab_size)
    impossible = group._replace(sample_lengths=np.array([*group.sample_lengths[:3], 60], np.int32))
    three = small_run.loader.Batch(*(column[:3] for column in group))
    trainer = small_run.Trainer(small_run.objective(config), params)
    metrics = trainer.update(impossible)
    assert metrics.infeasible == 1
    assert metrics.clips == 3
    np.testing.assert_allclose(
        metrics.loss,
        small_run.Trainer(small_run.objective(config), params).update(three).loss,
        rtol=1e-5,
    )
