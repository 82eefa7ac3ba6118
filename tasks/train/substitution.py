"""Stand-ins for the layers of an mlx-lm model: listened at, passed through, or answered for.

The model's own code runs on, so masks, rotary positions, soft-caps and heads stay its own. A stand-in
keeps its place in the list of layers and what plain attributes the model's code reads of a layer
(`use_sliding`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tasks.train.evaluating import evaluating

Hear = Callable[[mx.array], dict[int, mx.array]]
"""Token ids (batch, length) to the hidden states (batch, length, hidden) entering each depth; lazy arrays."""

_GIVEN = "given_hidden_states"
"""The attribute of a model that its stand-ins and `inject` share."""


class UnfitError(Exception):
    """The model's code does not let its layers be stood in for."""


class FrozenLayer(nn.Module):
    """Stands in for a frozen layer: runs it, unless what leaves the last frozen layer is given.

    Attributes:
        layer: absent when its memory was to be freed.
    """

    def __init__(self, layer: nn.Module, given: _Given, last: bool, keep: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        take_attributes(self, layer)
        self._given, self._last = given, last
        if keep:
            self.layer = layer

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        given = self._given.hidden
        if given is not None:
            if given.shape != hidden.shape:  # of another batch: read past their end, they kill the process
                raise ValueError(f"hidden states {given.shape} are given for a batch of {hidden.shape}")
            return given if self._last else hidden
        if "layer" not in self:
            raise RuntimeError("a model without its lower layers was called without their output")
        output: mx.array = self.layer(hidden, *args, **kwargs)
        return output


class _Given:
    """An object of its own: an array that is an attribute of a module would be its parameter."""

    hidden: mx.array | None = None


class _Listener(nn.Module):
    def __init__(self, layer: nn.Module, hear: Callable[[mx.array], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        take_attributes(self, layer)
        self.layer = layer
        self._hear = hear

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self._hear(hidden)
        output: mx.array = self.layer(hidden, *args, **kwargs)
        return output


class _AllHeard(Exception):  # noqa: N818  (no error: it ends a forward pass that has given all it should)
    pass


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The list of layers that the model's code walks through; `model.layers` may be a copy of it.

    Raises:
        UnfitError: the model keeps its layers in no list.
    """
    shown = list(model.layers)
    for module in model.modules():
        for value in module.values():
            if isinstance(value, list) and len(value) == len(shown) and all(map(operator.is_, value, shown)):
                return value
    raise UnfitError("its layers are in no list")


def replace_prefix(model: nn.Module, depth: int, keep: bool) -> list[nn.Module]:
    """Put stand-ins in the place of the first `depth` layers, and return those layers.

    From then on `inject` says before each call whether the layers run or what they would have given.

    Args:
        keep: whether the layers can still run; if not, their memory is freed once nobody else holds them.
    """
    layers, given = layers_of(model), _Given()
    taken = layers[:depth]
    layers[:depth] = [FrozenLayer(layer, given, layer is taken[-1], keep) for layer in taken]
    setattr(model, _GIVEN, given)
    return taken


def put_back(model: nn.Module, taken: list[nn.Module]) -> None:
    """Undo `replace_prefix`."""
    layers_of(model)[: len(taken)] = taken
    delattr(model, _GIVEN)


@contextmanager
def standing_in(model: nn.Module, depth: int) -> Iterator[None]:
    """While the block runs, `inject` decides whether the first `depth` layers run."""
    taken = replace_prefix(model, depth, keep=True)
    try:
        yield
    finally:
        put_back(model, taken)


def inject(model: nn.Module, hidden: mx.array | None) -> None:
    """Let the frozen layers give `hidden`, (batch, length, hidden), in the next calls; None: let them run.

    Raises:
        ValueError: hidden states for a model none of whose layers is stood in for.
    """
    given: _Given | None = getattr(model, _GIVEN, None)
    if given is not None:
        given.hidden = hidden
    elif hidden is not None:
        raise ValueError("hidden states are given to a model that computes all its layers")


@contextmanager
def listening(model: nn.Module, depths: Collection[int]) -> Iterator[Hear]:
    """While the block runs, hidden states can be heard at some depths; nothing past the deepest is run.

    The model is in evaluation mode.

    Raises:
        UnfitError: by what is yielded, when the layers are called in a way that is not known here.
    """
    layers = layers_of(model)
    kept = list(layers)
    heard: dict[int, mx.array] = {}
    for depth in depths:
        layers[depth] = _Listener(kept[depth], _note(heard, depth, max(depths)))

    def hear(inputs: mx.array) -> dict[int, mx.array]:
        heard.clear()
        try:
            model(inputs)
        except _AllHeard:
            return dict(heard)
        except (AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
            raise UnfitError(str(error)) from error
        raise UnfitError(f"its layer {max(depths)} is not called")

    try:
        with evaluating(model):
            yield hear
    finally:
        layers[:] = kept
        heard.clear()


def _note(heard: dict[int, mx.array], depth: int, deepest: int) -> Callable[[mx.array], None]:
    def note(hidden: mx.array) -> None:
        if not isinstance(hidden, mx.array) or hidden.ndim != 3:
            raise TypeError(f"its layer {depth} is not given (batch, length, hidden)")
        heard[depth] = hidden
        if depth == deepest:
            raise _AllHeard

    return note


def take_attributes(module: nn.Module, layer: nn.Module) -> None:
    """Give a stand-in the plain attributes of its layer."""
    for name, value in vars(layer).items():
        if not name.startswith("_"):
            object.__setattr__(module, name, value)
