"""A compiled update is the interpreted one."""

from __future__ import annotations

from itertools import islice

import mlx.core as mx
import numpy as np
import pytest
from test_train_loop import tiny_network

from tasks.config import TrainSettings
from tasks.prepare.splits import TokenRows
from tasks.train.adapters import adapter_weights
from tasks.train.batches import update_groups
from tasks.train.optimizers import make_optimizer
from tasks.train.update import Updates


@pytest.mark.compiled
@pytest.mark.parametrize(
    "changes", [{}, {"dropout": 0.3, "accumulation_steps": 2}, {"grad_checkpoint": True}]
)
def test_compiled_updates_equal_interpreted_ones(token_rows: TokenRows, changes: dict[str, object]) -> None:
    settings = TrainSettings.model_validate({"num_layers": 2, "batch_size": 4, "warmup_steps": 0, **changes})

    def updated(compiled: bool) -> tuple[list[float], dict[str, mx.array]]:
        mx.enable_compile() if compiled else mx.disable_compile()
        network = tiny_network(settings)
        network.train()
        updates = Updates(network, make_optimizer(settings), settings, steps=10)
        groups = update_groups(token_rows, 4, settings.accumulation_steps, seed=0)
        launched = [updates.launch(group.batches, step) for step, group in enumerate(islice(groups, 3), 1)]
        return [each.figures()["train_loss"] for each in launched], adapter_weights(network)

    plain, compiled = updated(False), updated(True)
    assert compiled[0] == pytest.approx(plain[0], rel=1e-6)
    assert all(np.allclose(np.array(compiled[1][n]), np.array(plain[1][n]), atol=1e-4) for n in plain[1])
