"""Losses and updated weights equal those of mlx-lm's own loss and optimizer step."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import FAMILIES, tiny_network
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import dequantize_model

from tasks.config import TrainSettings
from tasks.prepare.splits import TokenRows
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter
from tasks.train.batches import collate
from tasks.train.loss import batch_loss
from tasks.train.optimizers import make_optimizer, set_learning_rate
from tasks.train.targets import target_keys

LEARNING_RATE = 1e-3
EPSILON = 0.1
"""AdamW divides a gradient by its size: with the usual 1e-8 it makes as much of the rounding of a gradient of
1e-8 as of a large one, and sums in another order would move such a weight by a share of the learning rate."""
UPDATES = 3

# mlx-lm supervises one padding token of each padded row, so all rows are of one length.
TOKENS = np.random.default_rng(0).integers(3, 300, (UPDATES, 3, 12))


def base(kind: str, bits: int | None, method: str) -> nn.Module:
    """Full training is of weights that are not quantised: those that `load_model` makes of them on CPU."""
    network = tiny_network(kind, bits)
    return dequantize_model(network) if bits and method == "full" else network


def ours(network: nn.Module, settings: TrainSettings) -> list[float]:
    keys = target_keys(network, settings.targets)
    add_adapter(network, adapter_config(settings, 4, keys), settings.seed)
    optimizer = make_optimizer(settings)
    optimizer.eps = EPSILON
    loss_and_grad = nn.value_and_grad(network, lambda batch: batch_loss(network, batch))
    network.train()
    losses = []
    for tokens in TOKENS:
        rows = TokenRows.from_rows([(row.tolist(), [True] * len(row)) for row in tokens])
        loss, gradient = loss_and_grad(collate(rows, np.arange(len(rows))))
        set_learning_rate(optimizer, LEARNING_RATE)
        optimizer.update(network, gradient)
        mx.eval(network.parameters(), optimizer.state)
        losses.append(loss.item())
    return losses


def theirs(
    network: nn.Module, settings: TrainSettings, start: dict[str, mx.array], optimizer: optim.Optimizer
) -> list[float]:
    """As `train_model` and `train` of mlx-lm 0.32.2 do it, from our initial weights."""
    network.freeze()
    if settings.method == "full":
        for layer in network.layers[-settings.num_layers :]:
            layer.unfreeze()
    else:
        parameters = {"rank": settings.rank, "scale": settings.alpha / settings.rank, "dropout": 0.0}
        linear_to_lora_layers(network, settings.num_layers, parameters, use_dora=settings.method == "dora")
    assert adapter_weights(network).keys() == start.keys()
    network.load_weights(list(start.items()), strict=False)
    loss_and_grad = nn.value_and_grad(network, default_loss)
    network.train()
    losses = []
    for tokens in TOKENS:
        spans = mx.array([[0, tokens.shape[1]]] * len(tokens))
        (loss, _), gradient = loss_and_grad(network, mx.array(tokens), spans)
        optimizer.update(network, gradient)
        mx.eval(network.parameters(), optimizer.state)
        losses.append(loss.item())
    return losses


def farthest(left: dict[str, mx.array], right: dict[str, mx.array]) -> float:
    """The largest difference of two sets of weights, relative to the largest weight of its array."""
    assert left.keys() == right.keys()
    return max(
        float(mx.abs(left[name] - right[name]).max() / mx.maximum(mx.abs(right[name]).max(), 1e-30))
        for name in left
    )


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "quantised"])
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("kind", list(FAMILIES))
def test_losses_and_updated_weights_equal_mlx_lms(kind: str, method: str, bits: int | None) -> None:
    settings = TrainSettings.model_validate(
        {"method": method, "num_layers": 2, "rank": 4, "learning_rate": LEARNING_RATE}
    )
    mine, oracle = base(kind, bits, method), base(kind, bits, method)
    start_network = base(kind, bits, method)
    keys = target_keys(start_network, settings.targets)
    add_adapter(start_network, adapter_config(settings, 4, keys), settings.seed)
    start = adapter_weights(start_network)
    my_losses = ours(mine, settings)
    their_losses = theirs(
        oracle, settings, start, optim.AdamW(LEARNING_RATE, eps=EPSILON, weight_decay=0, bias_correction=True)
    )
    assert my_losses == pytest.approx(their_losses, rel=1e-6)
    assert my_losses[0] != my_losses[1]
    assert farthest(adapter_weights(mine), adapter_weights(oracle)) < 4e-6
    assert farthest(adapter_weights(mine), start) > 1e-3
