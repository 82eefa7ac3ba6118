"""A run that takes more than it may is stopped after an update, and goes on when it may take more."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from conftest import tiny_network

from tasks.config import TrainSettings
from tasks.prepare.splits import TokenRows
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter
from tasks.train.checkpoints import Checkpoints
from tasks.train.loop import fit
from tasks.train.memory_guard import MARGIN, MemoryGuard, OverBudget, holding_back


def test_a_run_over_its_budget_is_stopped_with_a_checkpoint_from_which_it_goes_on(
    token_rows: TokenRows, tmp_path: Path
) -> None:
    settings = TrainSettings(num_layers=2, batch_size=4, max_steps=6, warmup_steps=0)

    def run(folder: Path, guard: MemoryGuard | None) -> dict[str, mx.array]:
        network = tiny_network()
        add_adapter(network, adapter_config(settings, 4), settings.seed)
        kept = Checkpoints(folder, settings)
        fit(network, token_rows, token_rows, settings, lambda *_: None, kept, guard=guard)
        return adapter_weights(network)

    with pytest.raises(OverBudget, match=r"GB are taken, of 0\.00 GB allowed; a checkpoint is kept"):
        run(tmp_path / "stopped", MemoryGuard(1000))
    [checkpoint] = (tmp_path / "stopped").glob("step-*")
    assert checkpoint.name in ("step-00000001", "step-00000002"), "as soon as no update is under way"
    resumed, whole = run(tmp_path / "stopped", None), run(tmp_path / "whole", MemoryGuard(10**12))
    assert all(mx.array_equal(resumed[name], whole[name]) for name in whole)


def test_the_margin_is_what_a_prediction_may_be_wrong_by() -> None:
    mx.eval(mx.zeros((1000, 1000)))
    peak = mx.get_peak_memory()
    assert not MemoryGuard(round(peak / (1 + MARGIN)) + 2).exceeded
    assert MemoryGuard(round(peak / (1 + MARGIN)) - 2).exceeded


def test_mlx_runs_ahead_no_farther_than_the_budget() -> None:
    """Products of 4 MB one after another, which are handed over far sooner than they are computed."""
    matrix = mx.random.normal((1000, 1000))
    mx.eval(matrix)

    def peak() -> int:
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        total = mx.zeros(())
        for _ in range(30):
            total = total + mx.sum(matrix @ (matrix + total))
        mx.eval(total)
        return mx.get_peak_memory() - before

    limit = mx.get_memory_limit()
    unheld = peak()
    with holding_back(mx.get_active_memory() + 16_000_000):
        held = peak()
    assert mx.get_memory_limit() == limit
    assert held < 17_000_000 < 30_000_000 < unheld
