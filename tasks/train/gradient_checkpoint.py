"""Less memory for more time: layers keep their inputs only, and compute the rest again for the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@contextmanager
def gradient_checkpoint(model: nn.Module) -> Iterator[None]:
    """Let each layer of this one model keep no activations while the block runs.

    Each layer's class is exchanged for a subclass and back, so that no other model is touched
    (mlx-lm patches the class for the whole process, and once more on every call). Losses and
    gradients stay the same, with dropout too. Within another such block nothing changes.
    """
    layers = [layer for layer in model.layers if not isinstance(layer, _Recomputing)]
    plain = [type(layer) for layer in layers]
    for layer, kind in zip(layers, plain, strict=True):
        layer.__class__ = type(kind.__name__, (_Recomputing, kind), {"plain": kind})
    try:
        yield
    finally:
        for layer, kind in zip(layers, plain, strict=True):
            layer.__class__ = kind


class _Recomputing(nn.Module):
    """Mixed in before the class of a layer, `plain`."""

    plain: type[nn.Module]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = _random_state() if _drops_out(self) else None

        def compute(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            own = _trainable(self)
            self.update(parameters)
            try:
                with nullcontext() if start is None else _random_from(start):
                    return self.plain.__call__(self, *args, **kwargs)
            finally:
                # Otherwise the arrays of the second computation, and its graph, stay in the layer.
                self.update(own)

        return mx.checkpoint(compute)(_trainable(self), *args, **kwargs)


def _trainable(layer: nn.Module) -> Any:
    return layer.trainable_parameters()


def _drops_out(layer: nn.Module) -> bool:
    return any(isinstance(part, nn.Dropout) and part.training and part._p_1 < 1 for part in layer.modules())


@contextmanager
def _random_from(start: int) -> Iterator[None]:
    """Draw from the state that the first computation began with, and leave the generator as it would be.

    mx.checkpoint (0.32.4) calls the function a second time, where dropout would draw another mask
    and give the gradient of another loss.
    """
    before = _random_state()
    mx.random.seed(start)
    try:
        yield
    finally:
        if before != start:  # the second computation
            mx.random.seed(before)


def _random_state() -> int:
    """The global generator's key as the seed that gives it: `mx.random.state` cannot be assigned."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    return int(high << 32 | low)
