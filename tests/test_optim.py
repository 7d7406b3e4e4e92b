"""Schedules against transformers and fairseq, groups against torch, decay and freezing by name."""

import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from models import small_torch

from flax_asr import config, optim, step
from flax_asr.models import convert

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("warmup", [0, 1, 20])
@pytest.mark.parametrize("kind", ["linear", "constant", "cosine"])
def test_every_rate_is_that_of_transformers(kind, warmup):
    updates = 100
    settings = config.OptimConfig(learning_rate=7.5e-5, lr_scheduler_type=kind, warmup_steps=warmup)
    parameter = torch.nn.Parameter(torch.zeros(1))
    adamw = torch.optim.AdamW([parameter], lr=7.5e-5)
    oracle = {
        "linear": lambda: transformers.get_linear_schedule_with_warmup(adamw, warmup, updates),
        "constant": lambda: transformers.get_constant_schedule_with_warmup(adamw, warmup),
        "cosine": lambda: transformers.get_cosine_schedule_with_warmup(adamw, warmup, updates),
    }[kind]()
    theirs = []
    for _ in range(updates):
        theirs.append(oracle.get_last_lr()[0])
        adamw.step()
        oracle.step()
    ours = [float(optim.schedule(settings, updates)(s)) for s in range(updates)]
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-7 * 7.5e-5)
    if warmup:
        assert ours[0] == 0


def fairseq_tri_stage(step, peak, updates, ratios, first, last):
    """Written from the description of the schedule: a line, a plateau, a decay, then nothing."""
    warmup, hold, decay = (int(ratio * updates) for ratio in ratios)
    if step < warmup:
        return peak * (first + (1 - first) * step / warmup)
    if step < warmup + hold:
        return peak
    if step <= warmup + hold + decay:
        return peak * np.exp(np.log(last) * (step - warmup - hold) / decay)
    return peak * last


@pytest.mark.parametrize("ratios", [(0.1, 0.4, 0.5), (0.0, 0.25, 0.75), (0.2, 0.0, 0.8)])
def test_three_stages_are_those_of_fairseq(ratios):
    updates, peak = 200, 3e-5
    settings = config.OptimConfig(
        learning_rate=peak,
        lr_scheduler_type="tri_stage",
        warmup_fraction=ratios[0],
        hold_fraction=ratios[1],
    )
    ours = optim.schedule(settings, updates)(jnp.arange(updates + 5))
    theirs = [fairseq_tri_stage(s, peak, updates, ratios, 0.01, 0.05) for s in range(updates + 5)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_fraction_of_the_run_is_as_many_updates_as_in_the_trainer():
    for fraction, updates in ((0.1, 373), (0.0, 50), (0.25, 7), (0.5, 1)):
        arguments = types.SimpleNamespace(warmup_steps=fraction)
        theirs = transformers.TrainingArguments.get_warmup_steps(arguments, updates)
        given = config.OptimConfig(warmup_fraction=fraction)
        assert given.warmup_updates(updates) == theirs
        steps = config.OptimConfig(warmup_steps=theirs)
        every = jnp.arange(updates)
        np.testing.assert_array_equal(
            optim.schedule(given, updates)(every), optim.schedule(steps, updates)(every)
        )


def test_another_rate_for_the_head_is_a_parameter_group_of_its_own():
    rng = np.random.default_rng(0)
    start = {
        "lm_head/kernel": rng.normal(size=(6, 4)),
        "lm_head/bias": rng.normal(size=4),
        "wav2vec2/encoder/layers/0/attention/q_proj/kernel": rng.normal(size=(6, 6)),
    }
    start = {path: value.astype(np.float32) for path, value in start.items()}
    settings = config.OptimConfig(
        learning_rate=1e-3,
        head_learning_rate=2e-2,
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=1.0,
    )
    ours = {path: jnp.asarray(value) for path, value in start.items()}
    optimiser = optim.adamw(settings, optim.schedule(settings, 10))
    state = optimiser.init(ours)

    theirs = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in start.items()}
    head_kernel, head_bias, encoder = theirs.values()
    adamw = torch.optim.AdamW(
        [
            {"params": [encoder], "lr": 1e-3, "weight_decay": 0.1},
            {"params": [head_kernel], "lr": 2e-2, "weight_decay": 0.1},
            {"params": [head_bias], "lr": 2e-2, "weight_decay": 0.0},
        ]
    )
    schedule = transformers.get_linear_schedule_with_warmup(adamw, 2, 10)
    for _ in range(8):
        gradients = {p: rng.normal(size=v.shape).astype(np.float32) for p, v in start.items()}
        jax_gradients = {path: jnp.asarray(g) for path, g in gradients.items()}
        norm = optax.tree.norm(jax_gradients)
        moves, state = optimiser.update(jax_gradients, state, ours, norm=norm)
        ours = optax.apply_updates(ours, moves)
        for path, gradient in gradients.items():
            theirs[path].grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        adamw.step()
        schedule.step()
    for path, value in ours.items():
        assert np.abs(value - start[path]).max() > 1e-3, "nothing is compared"
        np.testing.assert_allclose(value, theirs[path].detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [0.5, 1.9, 2.1, 3.9, 40.0])
def test_gradients_are_clipped_as_torch_clips_them(norm):
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=9).astype(np.float32)
    gradient *= norm / np.linalg.norm(gradient)
    # With such an epsilon AdamW's first move is the gradient, divided by it.
    settings = config.OptimConfig(learning_rate=1.0, adam_epsilon=1e6, max_grad_norm=2.0)
    optimiser = optim.adamw(settings, optim.schedule(settings, 1))
    parameters = {"lm_head/bias": jnp.zeros(9)}
    state, given = optimiser.init(parameters), {"lm_head/bias": jnp.asarray(gradient)}
    moves, _ = optimiser.update(given, state, parameters, norm=jnp.float32(norm))
    theirs = torch.nn.Parameter(torch.zeros(9))
    theirs.grad = torch.tensor(gradient)
    torch.nn.utils.clip_grad_norm_([theirs], 2.0)
    np.testing.assert_allclose(moves["lm_head/bias"] * -1e6, theirs.grad, rtol=1e-4)


def test_what_decays_is_what_the_trainer_decays():
    model = small_torch.model("Wav2Vec2ForCTC", small_torch.config())
    names = transformers.trainer_pt_utils.get_parameter_names(model, [torch.nn.LayerNorm])
    theirs = {name for name in names if "bias" not in name}
    marked = {
        name: np.full(p.shape, float(name in theirs), np.float32)
        for name, p in model.named_parameters()
    }
    flat = step.flat(convert.params_from_torch(marked, model.config, head=True))
    assert {p for p, v in flat.items() if v.max() == 1} == {p for p in flat if optim.decays(p)}


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize(("architecture", "norm_comes_last"), [("xls-r", True), ("base", False)])
def test_of_the_encoder_only_what_comes_after_its_frozen_layers_is_trained(
    architecture, norm_comes_last, layers
):
    model_config = small_torch.config(architecture)
    is_trained = optim.trainable(config.ModelConfig(trainable_layers=layers), model_config)
    found = {"/".join(path) for path in convert.shapes(model_config, head=True)}
    beginnings = ["lm_head/"]
    if layers:
        beginnings.append("wav2vec2/encoder/layers/1/")
        beginnings += ["wav2vec2/encoder/layer_norm/"] if norm_comes_last else []
    expected = {path for path in found if path.startswith(tuple(beginnings))}
    assert {path for path in found if is_trained(path)} == expected


def test_the_loss_scale_is_that_of_torch_s_scaler_within_its_bounds(monkeypatch):
    monkeypatch.setattr(optim, "GROWTH_INTERVAL", 3)
    scale = optim.LossScale.create("fp16")
    theirs, good = torch.tensor(65536.0), torch.tensor(0, dtype=torch.int32)
    seen = set()
    for finite in np.random.default_rng(1).random(60) < 0.75:
        scale = scale.after(jnp.bool_(finite))
        torch._amp_update_scale_(theirs, good, torch.tensor(float(not finite)), 2.0, 0.5, 3)
        assert (scale.value, scale.good_updates) == (theirs.item(), good.item())
        seen.add(theirs.item())
    assert len(seen) == 15, "it moves in both directions"
    for finite, bound in ((True, optim.LARGEST_LOSS_SCALE), (False, optim.SMALLEST_LOSS_SCALE)):
        for _ in range(75):
            scale = scale.after(jnp.bool_(finite))
        assert scale.value == bound
