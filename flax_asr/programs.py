"""The programs of a run: its pmapped steps, each in every shape that occurs."""

from collections.abc import Sequence
from typing import NamedTuple

from flax_asr import (
    compilation,
    config,
    criterion,
    experiment,
    parallel,
    partition,
    static_shapes,
    step,
)

Key = tuple[str, int]
"""A function of step.py and its padded samples.

Training uses ("update_from", n) if an update is one micro-batch. Otherwise it uses ("accumulate",
n) for each micro-batch, or ("accumulate_head", n) during `model.freeze_encoder_steps`, and then
("update", 0). Scoring uses ("evaluate", n).
"""


class Steps(NamedTuple):
    """The parts from which the steps of a run are built.

    Attributes:
        cfg: the configuration, with its global batch size resolved.
        objective: the model and its loss.
        rule: how an update changes the parameters.
        layout: which arrays of the state are divided among the devices.
        state: shapes of the training state.
        train_shapes: shapes of training batches.
        eval_shapes: shapes of scored batches; empty if nothing is scored.
    """

    cfg: config.Config
    objective: criterion.Objective
    rule: step.Rule
    layout: partition.Layout
    state: step.TrainState
    train_shapes: static_shapes.Shapes
    eval_shapes: static_shapes.Shapes


def train_function(cfg: config.Config, device_count: int, update: int) -> str:
    """The name of the function that trains on the micro-batches of this update, counted from 0."""
    if experiment.updates_at_once(cfg, device_count):
        return "update_from"
    return "accumulate_head" if update < cfg.model.freeze_encoder_steps else "accumulate"


def jobs(
    steps: Steps, devices: parallel.Devices, updates: Sequence[int]
) -> dict[Key, compilation.Job]:
    """(Pmapped function, shapes of its arguments) for every program; largest shapes first.

    Args:
        steps: the parts of the run's steps.
        devices: the devices to run on.
        updates: the first and the last update still to do, counted from 0.
    """
    cfg, objective, layout = steps.cfg, steps.objective, steps.layout
    state = devices.placed_shapes(steps.state, layout.state)
    sums = devices.sum_shapes(steps.state.trainable)
    names = sorted({train_function(cfg, devices.count, update) for update in updates})
    at_once = names == ["update_from"]
    if at_once:
        learn = {"update_from": parallel.update_from(objective, steps.rule, devices, layout)}
    else:
        learn = {
            name: parallel.accumulate(objective, devices, layout, name == "accumulate_head")
            for name in names
        }
    found: dict[Key, compilation.Job] = {}
    for samples, tokens in reversed(list(steps.train_shapes)):
        batch = devices.train_batch_shapes(
            objective, cfg.train.per_device_train_batch_size, samples, tokens
        )
        arguments = (state, batch) if at_once else (state, sums, batch)
        found |= {(name, samples): (function, arguments) for name, function in learn.items()}
    if not at_once:
        found["update", 0] = (parallel.update(steps.rule, devices, layout), (state, sums))
    evaluate = parallel.evaluate(objective, devices, layout)
    for samples, tokens in reversed(list(steps.eval_shapes)):
        batch = devices.batch_shapes(cfg.train.per_device_eval_batch_size, samples, tokens)
        found["evaluate", samples] = (evaluate, (state.scored, batch))
    return found
