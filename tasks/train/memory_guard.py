"""A run is held to the memory that it is allowed: MLX runs ahead no farther, and what takes more all the
same is stopped after the updates under way, and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from tasks.errors import StepError

MARGIN = 0.1
"""Of the budget, by which a run may exceed it before it is stopped: the prediction's largest error."""


class OverBudget(StepError):  # noqa: N818  (what the run is)
    """A run took more memory than it may."""


@contextmanager
def holding_back(limit_bytes: int) -> Iterator[None]:
    """Within the block MLX waits for the machine before it hands over work beyond so much memory.

    It hands over up to ten tasks ahead otherwise, whose arrays all take memory at once. What is computed is
    the same, and a run whose least need is under the limit stays there, but for one operation at a time.
    """
    before = mx.set_memory_limit(limit_bytes)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


@dataclass(frozen=True)
class MemoryGuard:
    """What a run may take.

    Attributes:
        budget_bytes: of MLX's memory.
    """

    budget_bytes: int

    @property
    def exceeded(self) -> bool:
        """Whether the highest memory so far is over the budget by more than the margin."""
        return mx.get_peak_memory() > (1 + MARGIN) * self.budget_bytes

    def refusal(self, step: int) -> OverBudget:
        """What ends the run after update `step`, which is saved."""
        taken, allowed = mx.get_peak_memory() / 1e9, self.budget_bytes / 1e9
        return OverBudget(
            f"step {step}: {taken:.2f} GB are taken, of {allowed:.2f} GB allowed; a checkpoint is kept. "
            "'tunesmith estimate' shows what to change; a higher train.budget lets 'tunesmith resume' go on"
        )
