"""Stand-ins for the layers of an mlx-lm model: passed through, listened at, or answered for.

The model's own code runs on, so masks, rotary positions, soft-caps and heads stay its own. A stand-in
keeps its place in the list of layers and what plain attributes the model's code reads of a layer
(`use_sliding`), and has no parameters.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class PassThrough(nn.Module):
    """Gives back what it is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _take_attributes(self, layer)

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return hidden


class Injection(nn.Module):
    """Gives the hidden states of the batch under way, (batch, length, hidden), whatever it is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _take_attributes(self, layer)
        self.held = _Held()

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if self.held.hidden is None:
            raise RuntimeError("a model without its lower layers was called without their output")
        return self.held.hidden


class _Held:
    """An object of its own: an array that is an attribute of a module would be its parameter."""

    hidden: mx.array | None = None


class _Listener(nn.Module):
    def __init__(self, layer: nn.Module, heard: dict[int, mx.array], depth: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _take_attributes(self, layer)
        self.layer = layer
        self._hear = partial(heard.__setitem__, depth)  # the dictionary itself would be taken for parameters

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self._hear(hidden)
        output: mx.array = self.layer(hidden, *args, **kwargs)
        return output


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The list of layers that the model's code walks through; `model.layers` may be a copy of it.

    Raises:
        ValueError: the model keeps its layers in no list.
    """
    shown = list(model.layers)
    for module in model.modules():
        for value in module.values():
            if isinstance(value, list) and len(value) == len(shown) and all(map(operator.is_, value, shown)):
                return value
    raise ValueError("its layers are in no list")


def replace_prefix(model: nn.Module, depth: int) -> list[nn.Module]:
    """Take the first `depth` layers out of the model, and return them; `inject` gives their output.

    Their memory is freed when nothing else holds them.
    """
    layers = layers_of(model)
    taken = layers[:depth]
    layers[:depth] = [*map(PassThrough, taken[:-1]), Injection(taken[-1])]
    return taken


def put_back(model: nn.Module, taken: list[nn.Module]) -> None:
    """Undo `replace_prefix`."""
    layers_of(model)[: len(taken)] = taken


def inject(model: nn.Module, hidden: mx.array) -> None:
    """Let the layers that were taken out give `hidden`, (batch, length, hidden), in the next call."""
    for layer in layers_of(model):
        if isinstance(layer, Injection):
            layer.held.hidden = hidden


@contextmanager
def listening(model: nn.Module, depths: Collection[int]) -> Iterator[dict[int, mx.array]]:
    """While the block runs, a call leaves the hidden states entering layer d under d, for each depth.

    Layers from the deepest on are passed through; the arrays are lazy, so what comes after costs nothing.
    """
    layers = layers_of(model)
    kept = list(layers)
    heard: dict[int, mx.array] = {}
    deepest = max(depths)
    for place, layer in enumerate(kept):
        if place > deepest:
            layers[place] = PassThrough(layer)
        elif place in depths:
            layers[place] = _Listener(layer, heard, place)
    try:
        yield heard
    finally:
        layers[:] = kept


def _take_attributes(module: nn.Module, layer: nn.Module) -> None:
    for name, value in vars(layer).items():
        if not name.startswith("_"):
            object.__setattr__(module, name, value)
