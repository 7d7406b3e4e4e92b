"""Figures of the log between two lines, and over a stop between them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from flax_asr import step
from flax_asr.data import buckets
from flax_asr.record import window


class Data:
    samples = np.array([16_000, 8_000, 4_000, 16_000], np.int32)


SHAPES = (10_000, 20_000)
GROUPS = [
    buckets.Group(1, np.array([0, 3], np.int32)),
    buckets.Group(0, np.array([1, -1], np.int32)),
]


def metrics(loss: float, finite: bool = True, skipped: int = 0) -> step.Metrics:
    return step.Metrics(
        loss=jnp.float32(loss if finite else jnp.nan),
        learning_rate=jnp.float32(1e-3 * loss),
        next_learning_rate=jnp.float32(2e-3 * loss),
        grad_norm=jnp.float32(2 * loss if finite else jnp.nan),
        finite=jnp.bool_(finite),
        clips=jnp.float32(3),
        infeasible=jnp.float32(1),
        blank_fraction=jnp.float32(0.5),
        loss_scale=jnp.float32(4),
        skipped=jnp.int32(skipped),
        bad_in_a_row=jnp.int32(0),
    )


def add(to: window.Window, *args, at: int = 1, **kwargs) -> None:
    to.add(at, metrics(*args, **kwargs), GROUPS, lambda epoch: Data.samples, SHAPES)


def counted(event: dict) -> dict:
    clock = ("audio_seconds_per_second", "data_wait_seconds", "time")
    assert all(name in event for name in clock)
    return {name: value for name, value in event.items() if name not in clock}


def test_a_line_is_the_mean_over_its_updates_and_the_state_of_the_last():
    figures = window.Window({})
    add(figures, 1.0)
    add(figures, 2.0)
    event = figures.close(0.0)
    assert counted(event) == {
        "loss": 1.5,
        "learning_rate": pytest.approx(2e-3),
        "grad_norm": 4.0,
        "loss_scale": 4.0,
        "skipped_steps": 0,
        "infeasible_clips": 2,
        "blank_fraction": 0.5,
        # 40 000 real of 2 x 20 000 + 2 x 10 000 samples
        "padding": round(1 - 40_000 / 60_000, 4),
    }


def test_the_next_line_begins_anew():
    figures = window.Window({})
    add(figures, 1.0)
    figures.close(0.0)
    add(figures, 3.0)
    assert figures.close(0.0)["loss"] == 3.0


def test_bad_updates_are_not_in_the_mean():
    figures = window.Window({})
    add(figures, 1.0)
    add(figures, 9.0, finite=False, skipped=1)
    event = figures.close(0.0)
    assert (event["loss"], event["skipped_steps"], event["blank_fraction"]) == (1.0, 1, 0.5)


def test_a_line_without_a_good_update_has_no_loss():
    figures = window.Window({})
    add(figures, 9.0, finite=False)
    event = figures.close(0.0)
    assert np.isnan(event["loss"])
    assert np.isnan(event["grad_norm"])


def test_the_last_finite_update_is_remembered_over_lines_and_stops():
    figures = window.Window({})
    add(figures, 9.0, finite=False, at=1)
    assert figures.last_finite() == "no update was finite"
    add(figures, 1.5, at=2)
    add(figures, 9.0, finite=False, at=3)
    figures.close(0.0)
    add(figures, 9.0, finite=False, at=4)
    said = "the last finite one was at step 2: loss 1.5, gradient norm 3"
    assert figures.last_finite() == said
    assert window.Window(json.loads(json.dumps(figures.as_json()))).last_finite() == said


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
def test_a_stop_between_two_lines_changes_nothing(stop_after):
    losses = [0.1, 0.7, 1 / 3]
    whole = window.Window({})
    for loss in losses:
        add(whole, loss)
    before = window.Window({})
    for loss in losses[:stop_after]:
        add(before, loss)
    after = window.Window(json.loads(json.dumps(before.as_json())))
    for loss in losses[stop_after:]:
        add(after, loss)
    assert counted(after.close(0.0)) == counted(whole.close(0.0))


def test_pauses_do_not_count_as_training_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(window.time, "monotonic", lambda: now[0])
    figures = window.Window({})
    add(figures, 1.0)
    now[0] += 2
    with figures.paused():
        now[0] += 50
    assert figures.close(0.5)["audio_seconds_per_second"] == 40_000 / 16_000 / 2
    add(figures, 1.0)
    now[0] += 1
    event = figures.close(0.75)
    assert event["audio_seconds_per_second"] == 40_000 / 16_000
    assert event["data_wait_seconds"] == 0.25


def test_the_progress_bar_shows_loss_rate_and_padding():
    figures = window.Window({})
    add(figures, 1.25)
    assert figures.facts().keys() == {"loss", "audio s/s", "padding"}
    assert figures.facts()["loss"] == "1.25"
    assert figures.facts()["padding"] == "33%"


@pytest.mark.parametrize("jump", [-86_400, 86_400])
def test_a_clock_that_jumps_changes_no_rate(monkeypatch, jump):
    figures, now = window.Window({}), window.time.time()
    add(figures, 1.0)
    before = figures.close(0.0)
    monkeypatch.setattr(window.time, "time", lambda: now + jump)
    add(figures, 1.0)
    after = figures.close(0.0)
    assert after["time"] - before["time"] == pytest.approx(jump, abs=600)
    assert after["audio_seconds_per_second"] > 1.0
