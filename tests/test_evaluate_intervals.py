"""Intervals: paired, seeded, weighted by tokens, and as wide as theory says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tasks.evaluate import intervals
from tasks.evaluate.intervals import Interval, interval, mean_interval, ratio_interval


def pairs(rows: int, shift: float, seed: int = 0) -> tuple[list[float], list[float], list[float]]:
    """Sums over rows of differing difficulty, the second model better by `shift` a token, and the tokens."""
    random = np.random.default_rng(seed)
    tokens = random.integers(5, 200, rows).astype(float)
    base = tokens * random.normal(3, 1, rows)
    tuned = base + tokens * (random.normal(0, 0.1, rows) - shift)
    return base.tolist(), tuned.tolist(), tokens.tolist()


def test_a_small_steady_gain_is_seen_through_rows_that_differ_much() -> None:
    base, tuned, tokens = pairs(200, shift=0.05)
    found = ratio_interval(base, tuned, tokens, seed=0)
    assert found.change == pytest.approx((sum(tuned) - sum(base)) / sum(tokens))
    assert found.low < found.change < found.high < 0
    assert found.excludes_zero
    random = np.random.default_rng(1)
    other = random.permutation(len(tuned))
    unpaired = ratio_interval(base, (np.array(tuned)[other]).tolist(), tokens, seed=0)
    assert unpaired.high - unpaired.low > 5 * (found.high - found.low), "the rows have to be paired"


def test_no_gain_holds_zero_and_identical_models_have_no_width() -> None:
    base, tuned, tokens = pairs(200, shift=0.0)
    assert not ratio_interval(base, tuned, tokens, seed=0).excludes_zero
    assert ratio_interval(base, base, tokens, seed=0) == Interval(0.0, 0.0, 0.0)


def test_the_width_is_that_of_the_normal_approximation() -> None:
    random = np.random.default_rng(2)
    differences = random.normal(0.5, 2, 400)
    found = mean_interval([0.0] * 400, differences.tolist(), seed=0)
    expected = 2 * 1.96 * differences.std(ddof=1) / math.sqrt(400)
    assert found.high - found.low == pytest.approx(expected, rel=0.06)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(100):
        found = mean_interval([0.0] * 60, np.random.default_rng(seed).normal(0, 1, 60).tolist(), seed=0)
        held += not found.excludes_zero
    assert 88 <= held <= 99


def test_the_same_seed_gives_the_same_interval_and_another_seed_nearly_the_same() -> None:
    base, tuned, tokens = pairs(50, shift=0.05)
    first = ratio_interval(base, tuned, tokens, seed=0)
    assert first == ratio_interval(base, tuned, tokens, seed=0)
    other = ratio_interval(base, tuned, tokens, seed=1)
    assert first != other
    assert first.low == pytest.approx(other.low, rel=0.1)


def test_rows_without_tokens_take_no_part_and_one_row_says_nothing() -> None:
    base, tuned, tokens = pairs(50, shift=0.05)
    expected = ratio_interval(base, tuned, tokens, seed=0)
    assert ratio_interval([*base, 0.0], [*tuned, 0.0], [*tokens, 0.0], seed=0) == expected
    alone = ratio_interval([3.0], [2.0], [1.0], seed=0)
    assert (alone.change, alone.excludes_zero) == (-1.0, False)


def test_many_rows_are_drawn_in_groups_without_changing_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, tokens = pairs(3000, shift=0.01)
    grouped = ratio_interval(base, tuned, tokens, seed=0)
    drawn: list[tuple[int, ...]] = []
    monkeypatch.setattr(intervals, "MOST_UNITS", 3000)
    single = ratio_interval(base, tuned, tokens, seed=0)
    assert grouped.change == pytest.approx(single.change)
    assert grouped.high - grouped.low == pytest.approx(single.high - single.low, rel=0.1)

    def difference(sums: np.ndarray) -> np.ndarray:
        drawn.append(sums.shape)
        return sums[:, 0]

    monkeypatch.setattr(intervals, "MOST_UNITS", 100)
    interval(np.ones((1, 3000)), difference, seed=0)
    assert sum(shape[0] for shape in drawn) == intervals.SAMPLES + 1
