"""Schedules against transformers', decay and freezing by name."""

import numpy as np
import pytest
import torch
import transformers
from models import small_torch

from flax_asr import config, optim, step
from flax_asr.models import convert


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


def test_what_decays_is_what_the_trainer_decays():
    model = small_torch.model("Wav2Vec2ForCTC", small_torch.config())
    names = transformers.trainer_pt_utils.get_parameter_names(model, [torch.nn.LayerNorm])
    theirs = {name for name in names if "bias" not in name}
    marked = {
        name: np.full(p.shape, float(name in theirs), np.float32)
        for name, p in model.named_parameters()
    }
    flat, _ = step.split(
        convert.params_from_torch(marked, model.config, head=True), lambda path: True
    )
    assert {p for p, v in flat.items() if v.max() == 1} == {p for p in flat if optim.decays(p)}
