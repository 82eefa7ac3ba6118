"""The optimizers of MLX by name, set up as their papers mean them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from tasks.config import TrainSettings


def make_optimizer(settings: TrainSettings) -> optim.Optimizer:
    """The optimizer of these settings; its learning rate is set before each update."""
    return optim.AdamW(settings.learning_rate, weight_decay=settings.weight_decay, bias_correction=True)


def set_learning_rate(optimizer: optim.Optimizer, value: float) -> None:
    """Set the learning rate of the next update."""
    optimizer.learning_rate = value


def optimizer_state(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The optimizer's arrays by name, in sorted order."""
    return dict(sorted(dict(tree_flatten(optimizer.state)).items()))


def restore_optimizer(optimizer: optim.Optimizer, model: nn.Module, arrays: dict[str, mx.array]) -> None:
    """Put back what `optimizer_state` gave."""
    optimizer.state = tree_unflatten(list(arrays.items()))
