"""A run that takes more than it may is stopped after an update, and what it learnt is kept."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tasks.train.memory_guard import MARGIN, MemoryGuard, OverBudget


def test_over_the_margin_the_run_is_saved_and_stopped() -> None:
    mx.eval(mx.zeros((1000, 1000)))
    saved: list[str] = []
    with pytest.raises(OverBudget, match="step 3"):
        MemoryGuard(1000).check(3, lambda: saved.append("checkpoint"))
    assert saved == ["checkpoint"]


def test_within_the_margin_nothing_happens() -> None:
    saved: list[str] = []
    MemoryGuard(int(mx.get_peak_memory() / (1 + MARGIN)) + 2).check(3, lambda: saved.append("checkpoint"))
    assert not saved
