"""A run that takes more memory than it was allowed is stopped after the update under way, its checkpoint
kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from tasks.errors import StepError

MARGIN = 0.1
"""Of the budget, by which a run may exceed it before it is stopped: the prediction's largest error."""


class OverBudget(StepError):  # noqa: N818  (what the run is)
    """A run took more memory than it may."""


@dataclass(frozen=True)
class MemoryGuard:
    """What a run may take.

    Attributes:
        budget_bytes: of MLX's memory.
    """

    budget_bytes: int

    def check(self, step: int, save: Callable[[], None]) -> None:
        """Called after update `step`.

        Raises:
            OverBudget: the highest memory so far is over the budget by more than the margin; it is saved.
        """
        peak = mx.get_peak_memory()
        if peak <= (1 + MARGIN) * self.budget_bytes:
            return
        save()
        raise OverBudget(
            f"step {step}: {peak / 1e9:.2f} GB are taken, of {self.budget_bytes / 1e9:.2f} GB allowed; a "
            "checkpoint is kept. 'tunesmith estimate' shows what to change; a higher train.budget lets "
            "'tunesmith resume' go on"
        )
