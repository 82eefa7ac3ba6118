"""How the losses went, in a table of a dozen lines: one a validation, with what happened since the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

MOST_LINES = 16

History = Sequence[tuple[int, Mapping[str, float]]]


def progression(history: History) -> list[dict[str, Any]]:
    """A line a validation: step, epoch, mean training loss since the last, validation loss, its change.

    Of many validations so many are left out, evenly, that `MOST_LINES` stay, with the first, the best and
    the last among them; training losses are means over all steps between the lines that are shown.
    """
    steps = [step for step, metrics in history if "val_loss" in metrics]
    if not steps:
        return []
    losses = {step: metrics["val_loss"] for step, metrics in history if "val_loss" in metrics}
    best = min(losses, key=lambda step: losses[step])
    lines: list[dict[str, Any]] = []
    since = -1
    for step in _chosen(steps, best):
        between = [metrics for at, metrics in history if since < at <= step]
        lines.append(
            {
                "step": step,
                "epoch": _last(between, "epoch"),
                "train_loss": _mean(between, "train_loss"),
                "val_loss": losses[step],
                "change": losses[step] / losses[steps[0]] - 1 if step != steps[0] else None,
                "learning_rate": _last(between, "learning_rate"),
                "tokens_per_second": _mean(between, "tokens_per_second"),
                "best": step == best,
            }
        )
        since = step
    return lines


def _chosen(steps: Sequence[int], best: int) -> list[int]:
    if len(steps) <= MOST_LINES:
        return list(steps)
    places = {round(index * (len(steps) - 1) / (MOST_LINES - 2)) for index in range(MOST_LINES - 1)}
    return sorted({*(steps[place] for place in places), best})


def _mean(metrics: Sequence[Mapping[str, float]], name: str) -> float | None:
    values = [each[name] for each in metrics if name in each]
    return fmean(values) if values else None


def _last(metrics: Sequence[Mapping[str, float]], name: str) -> float | None:
    return next((each[name] for each in reversed(metrics) if name in each), None)
