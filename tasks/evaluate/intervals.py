"""Paired bootstrap: how far the difference of two models on the same rows could be chance.

Rows are drawn with replacement, the same rows for both models, and the difference is computed anew each
time; the middle 95% of those differences is the interval (Efron and Tibshirani 1993, chapter 13; for
text metrics Koehn 2004). It speaks of other rows of the same kind, not of other trainings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SAMPLES = 4000
"""Draws: the ends of the interval are then known to about 2% of its width."""

MOST_UNITS = 2000
"""Of more rows, groups are drawn, which are just as independent: the work does not grow with the data."""

DRAWN_AT_ONCE = 2_000_000
"""Numbers in memory together."""

LEVEL = 0.95

Counts = NDArray[np.int64]
"""(draws, rows): how often each row was drawn."""


@dataclass(frozen=True)
class Interval:
    """A difference, tuned minus base, and where it lies with 95% confidence."""

    change: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """The difference is more than chance in the choice of the rows."""
        return self.low > 0 or self.high < 0


def ratio_interval(
    base: Sequence[float], tuned: Sequence[float], weights: Sequence[float], seed: int
) -> Interval:
    """Of the difference of two weighted means, as of losses over tokens.

    Args:
        base, tuned: (rows,) sums over each row.
        weights: (rows,) what they are sums over; rows without weight take no part.
    """
    columns = np.array([base, tuned, weights], np.float64)
    columns = columns[:, columns[2] > 0]

    def difference(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        return (totals[:, 1] - totals[:, 0]) / totals[:, 2]

    return interval(columns, difference, seed)


def mean_interval(base: Sequence[float], tuned: Sequence[float], seed: int) -> Interval:
    """Of the difference of two means over rows, as of chrF."""
    return ratio_interval(base, tuned, [1.0] * len(base), seed)


def interval(
    columns: NDArray[np.float64],
    difference: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    seed: int,
) -> Interval:
    """Of any difference that follows from sums over the rows.

    Args:
        columns: (figures, rows), what is summed.
        difference: from sums (draws, figures) to differences (draws,).
    """
    units = _grouped(columns)
    change = float(difference(units.sum(axis=1)[None])[0])
    if units.shape[1] < 2:
        return Interval(change, -np.inf, np.inf)
    drawn = np.concatenate([difference(counts @ units.T) for counts in _draws(units.shape[1], seed)])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(change, float(low), float(high))


def _grouped(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """(figures, at most `MOST_UNITS`): rows far apart summed together, so that order means nothing."""
    rows = columns.shape[1]
    if rows <= MOST_UNITS:
        return columns
    group = np.arange(rows) % MOST_UNITS
    return np.stack([np.bincount(group, weights=column) for column in columns])


def _draws(units: int, seed: int) -> Iterator[Counts]:
    random = np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // units)
    for start in range(0, SAMPLES, at_once):
        yield random.multinomial(units, np.full(units, 1 / units), size=min(at_once, SAMPLES - start))
