"""Is a challenger better than its rival on the same test rows, and by more than chance?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.evaluate.intervals import ratio_interval
from tasks.evaluate.text_metrics import LOWER_IS_BETTER

Figures = Mapping[str, Any]
"""What `evaluation.json` holds."""

SEED = 0
"""Of the interval's draws: the same two versions are judged the same each time."""


@dataclass(frozen=True)
class Verdict:
    """Whether to prefer the challenger, and why in a sentence with both figures."""

    better: bool
    reason: str


def compare(metric: str, challenger: Figures, rival: Figures, rival_name: str) -> Verdict:
    """Compare two evaluations on the same rows by a figure.

    With figures of single rows on both sides the challenger has to be better by more than the 95%
    interval of a paired bootstrap, else only in the mean, which is said.

    Args:
        metric: a name in both, such as test_loss or chrf.
    """
    if metric not in challenger or metric not in rival:
        known = sorted(name for name, value in challenger.items() if isinstance(value, int | float))
        return Verdict(False, f"register.metric = '{metric}' was not measured; there are {', '.join(known)}")
    new, old = float(challenger[metric]), float(rival[metric])
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    told = f"{metric} {new:.4f} against {old:.4f} of {rival_name}"
    paired = _paired(metric, challenger, rival)
    if paired is None:
        ahead = sign * (new - old) > 0
        return Verdict(
            ahead, f"{told}, which is {'better' if ahead else 'not better'} (means alone compared)"
        )
    new_rows, old_rows, weights = paired
    found = ratio_interval(old_rows, new_rows, weights, SEED)
    name = "loss" if metric == "perplexity" else metric
    ahead = found.low > 0 if sign > 0 else found.high < 0
    beyond = "beyond" if ahead else "not beyond"
    return Verdict(
        ahead,
        f"{told}, {beyond} chance: the difference of {name} is {found.low:+.4f} to {found.high:+.4f} (95%)",
    )


def _paired(metric: str, new: Figures, old: Figures) -> tuple[list[float], list[float], list[float]] | None:
    """The figures of single rows on both sides and their weights; None where they are not known."""
    ours, theirs = _row_figures(metric, new), _row_figures(metric, old)
    if ours is None or theirs is None or ours[1] != theirs[1]:
        return None
    return ours[0], theirs[0], ours[1]


def _row_figures(metric: str, figures: Figures) -> tuple[list[float], list[float]] | None:
    """(rows,) sums and weights; rows without weight, which have nothing to learn, take no part."""
    if metric in ("test_loss", "perplexity"):  # of the same order
        rows = [row for row in figures.get("rows", []) if row["tokens"] > 0]
        return ([row["nll"] for row in rows], [row["tokens"] for row in rows]) if rows else None
    answers = figures.get("answers", [])
    values = [answer.get(metric) for answer in answers]
    if not values or not all(isinstance(value, int | float) for value in values):
        return None
    return [float(value) for value in values], [1.0] * len(values)
