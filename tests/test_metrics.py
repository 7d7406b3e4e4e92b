"""Error counts against a Levenshtein distance written here, and the bootstrap's coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_asr.metrics import ErrorCounts, bootstrap_interval, character_errors, word_errors


def distance(reference, hypothesis):
    row = list(range(len(hypothesis) + 1))
    for i, left in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(hypothesis, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


texts = st.text(alphabet="ab 你𠮷é\t", max_size=12)


@settings(max_examples=200, deadline=None)
@given(texts, texts)
def test_words_equal_brute_force(reference, hypothesis):
    words = reference.split()
    expected = ErrorCounts(distance(words, hypothesis.split()), len(words))
    assert word_errors(reference, hypothesis) == expected


@settings(max_examples=200, deadline=None)
@given(texts, texts, st.booleans())
def test_characters_equal_brute_force(reference, hypothesis, count_spaces):
    between = " " if count_spaces else ""
    left, right = between.join(reference.split()), between.join(hypothesis.split())
    expected = ErrorCounts(distance(left, right), len(left))
    assert character_errors(reference, hypothesis, count_spaces) == expected


def test_an_empty_reference_has_no_units_and_only_insertions():
    assert word_errors("", "one two") == ErrorCounts(2, 0)
    assert character_errors("", "好的") == ErrorCounts(2, 0)
    assert character_errors("", "") == ErrorCounts(0, 0)


def test_a_character_beyond_the_basic_plane_is_one():
    assert character_errors("𠮷野家", "吉野家") == ErrorCounts(1, 3)


def test_counts_are_pooled_and_divided_once():
    total = sum([ErrorCounts(1, 2), ErrorCounts(3, 6), ErrorCounts(1, 0)], ErrorCounts())
    assert total == ErrorCounts(5, 8)
    assert total.rate == 5 / 8
    assert ErrorCounts(0, 0).rate == 0.0
    assert ErrorCounts(2, 0).rate == np.inf


def test_the_interval_covers_the_true_rate_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        units = generator.integers(5, 20, size=80)
        errors = generator.binomial(units, 0.3)
        low, high = bootstrap_interval(errors, units, seed=trial, resamples=200, level=0.8)
        assert low <= errors.sum() / units.sum() <= high
        covered += low <= 0.3 <= high
    # 80 expected; 5 standard deviations of a binomial, less the interval's own bias.
    assert 60 <= covered <= 97


def test_the_interval_leaves_half_of_the_rest_on_either_side():
    generator = np.random.default_rng(0)
    units = generator.integers(5, 20, size=80)
    errors = generator.binomial(units, 0.3)
    low, high = bootstrap_interval(errors, units, seed=1, resamples=4000, level=0.8)
    drawn = generator.integers(80, size=(4000, 80))
    rates = errors[drawn].sum(axis=1) / units[drawn].sum(axis=1)
    # Five standard deviations of the difference between two such shares.
    assert (rates < low).mean() == pytest.approx(0.1, abs=0.034)
    assert (rates > high).mean() == pytest.approx(0.1, abs=0.034)


def test_the_interval_depends_on_the_seed_alone():
    errors, units = np.array([0, 1, 5, 2]), np.array([4, 4, 9, 3])
    assert bootstrap_interval(errors, units, seed=1) == bootstrap_interval(errors, units, seed=1)


def test_the_interval_survives_clips_without_words():
    assert bootstrap_interval(np.array([1, 0]), np.array([0, 0]), seed=0) == (0.0, np.inf)
    with pytest.raises(ValueError, match="0 error counts"):
        bootstrap_interval(np.array([], int), np.array([], int), seed=0)
