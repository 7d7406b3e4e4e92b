"""The phases of a run, judged on figures of real shapes: healthy, too timid, too bold."""

import logging

import pytest

from flax_asr.estimate import forecast
from flax_asr.record import learning

# About those of the published zh-HK run: 3600 characters, clips of 4 seconds.
EXPECTED = forecast.Losses(first=110.0, plateau=6.4, unigram_entropy=6.1, token_share=0.06)
UPDATES = 18_650


def _figures(loss: float, blank_fraction: float) -> dict:
    return {"loss": loss, "blank_fraction": blank_fraction, "learning_rate": 7.5e-5}


def _watch(updates: int = UPDATES, history=(), fresh_head: bool = True) -> learning.Watch:
    return learning.Watch(EXPECTED, fresh_head, updates, history)


def _phases(*lines: tuple[float, float]) -> list[str]:
    watch = _watch()
    return [watch.look(100 * n, _figures(*line))["phase"] for n, line in enumerate(lines, 1)]


def test_a_healthy_run_passes_over_the_plateau():
    assert _phases((77.5, 0.3), (9.4, 1.0), (6.3, 1.0), (6.0, 1.0), (5.4, 0.985), (2.2, 0.93)) == [
        learning.BEGINNING,
        learning.BEGINNING,
        learning.PLATEAU,
        learning.PLATEAU,
        learning.LEARNING,
        learning.LEARNING,
    ]


def test_a_rate_too_small_never_gets_to_the_plateau():
    assert _phases((109.0, 0.1), (101.0, 0.1), (92.0, 0.2)) == [learning.BEGINNING] * 3


def test_a_rate_too_large_falls_back_or_diverges():
    assert _phases((6.3, 1.0), (4.0, 0.95), (6.5, 1.0))[-1] == learning.PLATEAU
    assert _phases((6.3, 1.0), (4.0, 0.95), (30.0, 0.8))[-1] == learning.DIVERGING
    assert _phases((6.3, 1.0), (float("nan"), 1.0))[-1] == learning.DIVERGING
    assert _phases((500.0, 0.5)) == [learning.DIVERGING]
    assert _phases((150.0, 0.5)) == [learning.BEGINNING]  # batches differ


def test_updates_skipped_until_the_loss_scale_fits_are_no_divergence(caplog):
    with caplog.at_level(logging.INFO, logger="flax_asr.record.learning"):
        assert _phases((float("nan"), 1.0), (80.0, 0.9)) == [learning.BEGINNING] * 2
    assert "no update was finite yet" in caplog.text
    watch = _watch(updates=10)
    with caplog.at_level(logging.WARNING, logger="flax_asr.record.learning"):
        for step in range(1, 5):
            watch.look(step, _figures(float("nan"), 1.0))
        assert "still before" not in caplog.text  # no rate mends what the scale does
        watch.look(5, _figures(80.0, 0.9))
    assert "with a loss of 80 and" in caplog.text


def test_a_head_that_is_kept_learns_at_once_and_has_no_first_loss():
    watch = _watch(fresh_head=False)
    assert watch.look(100, _figures(1.2, 0.93))["phase"] == learning.LEARNING
    assert watch.expectations() == {"plateau_loss": 6.4, "unigram_entropy": 6.1}
    assert _watch().expectations()["expected_first_loss"] == 110.0


def test_every_change_is_said_in_words_and_nothing_else_is(caplog):
    watch = _watch()
    with caplog.at_level(logging.INFO, logger="flax_asr.record.learning"):
        for n, line in enumerate([(77.5, 0.3), (6.3, 1.0), (6.2, 1.0), (5.0, 0.97), (6.4, 1.0)], 1):
            watch.look(100 * n, _figures(*line))
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in said] == [
        "step 100",
        "step 200",
        "step 400",
        "step 500",
    ]
    for line, words in zip(
        said,
        [
            "on its way from about 110 to about 6.4",
            "on the blank plateau: a loss near 6.4",
            "left the blank plateau after 200 updates: symbols on 3.0% of the frames",
            "fell back to the blank plateau",
        ],
        strict=True,
    ):
        assert words in line
    assert "unigram entropy 6.1 nats" in said[1]
    assert watch.facts() == {"model": "on the blank plateau"}


def test_a_long_stay_is_said_once(caplog):
    watch = _watch(updates=1000)
    with caplog.at_level(logging.WARNING, logger="flax_asr.record.learning"):
        for step in range(100, 800, 100):
            watch.look(step, _figures(6.2, 1.0))
    (record,) = caplog.records
    assert "still on the blank plateau after 200 of 1000 updates" in record.getMessage()


def test_a_second_long_stay_is_said_again(caplog):
    watch = _watch(updates=1000)
    with caplog.at_level(logging.WARNING, logger="flax_asr.record.learning"):
        for step in range(100, 1000, 100):
            watch.look(step, _figures(*((4.0, 0.95) if step == 500 else (6.2, 1.0))))
    assert [record.args[0] for record in caplog.records] == [300, 800]


def test_a_run_too_timid_for_the_plateau_is_told_once(caplog):
    watch = _watch(updates=1000)
    with caplog.at_level(logging.WARNING, logger="flax_asr.record.learning"):
        for step in range(100, 1000, 100):
            watch.look(step, _figures(100.0, 0.2))
    (record,) = caplog.records
    said = record.getMessage()
    assert "step 200: still before the blank plateau after 200 of 1000 updates" in said
    assert "much too small" in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ((100.0, 0.2), "its model is useless"),
        ((float("nan"), 1.0), "without a finite update"),
        ((6.3, 1.0), "its model outputs next to nothing"),
        ((500.0, 0.5), "worse than one that outputs nothing"),
        ((2.2, 0.93), None),
    ],
)
def test_a_run_that_ends_without_having_learnt_says_so(caplog, line, words):
    watch = _watch(updates=200)
    with caplog.at_level(logging.WARNING, logger="flax_asr.record.learning"):
        watch.look(100, _figures(*line))
        said = len(caplog.records)
        watch.look(200, _figures(*line))
    ends = [r.getMessage() for r in caplog.records[said:] if "the run ends" in r.getMessage()]
    assert [words in end for end in ends] == ([] if words is None else [True])


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_resumed_run_says_what_the_whole_one_would(caplog, stop_after):
    lines = [(77.5, 0.3), (6.3, 1.0), (6.2, 1.0), (5.0, 0.97)]
    watch, history = _watch(), []
    for n, line in enumerate(lines, 1):
        if n == stop_after + 1:
            watch = _watch(history=history)
        history.append({"step": 100 * n, **watch.look(100 * n, _figures(*line))})
    with caplog.at_level(logging.INFO, logger="flax_asr.record.learning"):
        watch.look(500, _figures(6.3, 1.0))
    assert "fell back" in caplog.text
    assert [event["phase"] for event in history] == _phases(*lines)
