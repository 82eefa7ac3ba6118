"""The optimizers of MLX by name, set up as their papers mean them."""

from __future__ import annotations

import mlx.optimizers as optim

from tasks.config import TrainSettings


def make_optimizer(settings: TrainSettings) -> optim.Optimizer:
    """The optimizer of these settings; its learning rate is set before each update."""
    return optim.AdamW(settings.learning_rate, weight_decay=settings.weight_decay, bias_correction=True)
