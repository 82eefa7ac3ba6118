"""A model in evaluation mode for a while: no dropout, whatever it was doing before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.nn as nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in the block, and the model's own mode again after it, however it ends."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
