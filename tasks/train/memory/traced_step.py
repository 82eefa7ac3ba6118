"""The graphs of a training run's work, traced through the product's own modules on a network without
weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from tasks.config import TrainSettings
from tasks.models.cpu_functions import cross_entropy_gradient
from tasks.models.device import on_gpu
from tasks.models.quantised_products import dequantised_once
from tasks.train.adapters import adapter_weights
from tasks.train.head_loss import chunks
from tasks.train.memory.graph import Graph, graph_of, instead_of, recomputed
from tasks.train.memory.traced_functions import cross_entropy, fused_cross_entropy, fused_gradient
from tasks.train.optimizers import make_optimizer, optimizer_state
from tasks.train.substitution import inject, listening
from tasks.train.supervised import head_logits, log_probabilities, plain_logits, supervised_hidden

WEIGHT, TRAINED, OPTIMIZER, BATCH, GRADIENT = "weight", "trained", "optimizer", "batch", "gradient"
"""What the names of a graph's inputs begin with."""


@dataclass(frozen=True)
class BatchShape:
    """Of a batch as `collate` makes it.

    Attributes:
        supervised: places in `positions`, padding among them.
        hidden_dtype: of the hidden states that come with it; None where the frozen layers run.
    """

    rows: int
    length: int
    supervised: int
    hidden_dtype: mx.Dtype | None = None

    def arrays(self, width: int) -> dict[str, mx.array]:
        """Arrays of these shapes, never evaluated, named as `summed_loss` has them."""
        ids = {"inputs": mx.zeros((self.rows, self.length), mx.int32)}
        ids |= {name: mx.zeros((self.supervised,), mx.int32) for name in ("positions", "targets")}
        ids["weights"] = mx.zeros((self.supervised,))
        if self.hidden_dtype is not None:
            ids["hidden"] = mx.zeros((self.rows, self.length, width), self.hidden_dtype)
        return {f"{BATCH}.{name}": array for name, array in ids.items()}


def update_graph(network: nn.Module, settings: TrainSettings, shape: BatchShape) -> Graph:
    """One whole update of one batch: loss, gradient, optimizer. The network is in training mode."""
    optimizer = _optimizer(network, settings)

    def update(**arrays: mx.array) -> list[mx.array]:
        take(network, arrays)
        _take_state(optimizer, arrays)
        loss, gradient = _loss_and_gradient(network, settings, arrays)
        held = [array for _, array in flat(gradient)]  # by `Updates.launch`, to its end
        return [loss, *held, *_applied(network, optimizer, settings, gradient)]

    return graph_of(update, {**_inputs(network, shape), **_state(optimizer)})


def gradient_graph(network: nn.Module, settings: TrainSettings, shape: BatchShape) -> Graph:
    """A batch of several of one update: its gradient, added to what is there."""

    def add(**arrays: mx.array) -> list[mx.array]:
        take(network, arrays)
        loss, gradient = _loss_and_gradient(network, settings, arrays)
        found: list[tuple[str, mx.array]] = flat(gradient)
        return [loss, *(arrays[f"{GRADIENT}.{name}"] + array for name, array in found)]

    return graph_of(add, {**_inputs(network, shape), **_gradients(network)})


def apply_graph(network: nn.Module, settings: TrainSettings) -> Graph:
    """The end of an update of several batches."""
    optimizer = _optimizer(network, settings)

    def apply(**arrays: mx.array) -> list[mx.array]:
        take(network, arrays)
        _take_state(optimizer, arrays)
        gradient = tree_unflatten([(name, arrays[f"{GRADIENT}.{name}"]) for name in adapter_weights(network)])
        return _applied(network, optimizer, settings, gradient)

    weights = {f"{TRAINED}.{name}": array for name, array in adapter_weights(network).items()}
    return graph_of(apply, {**weights, **_gradients(network), **_state(optimizer)})


def validation_graph(network: nn.Module, shape: BatchShape) -> Graph:
    """The loss of a batch. The network is in evaluation mode."""

    def validate(**arrays: mx.array) -> list[mx.array]:
        take(network, arrays)
        return [_loss(network, arrays)]

    return graph_of(validate, _inputs(network, shape))


def forward_graph(network: nn.Module, rows: int, length: int, heard: int) -> Graph:
    """The first `heard` layers over a batch of tokens, as a prefix is built."""

    def forward(**arrays: mx.array) -> list[mx.array]:
        take(network, arrays)
        with listening(network, [heard]) as hear:
            return list(hear(arrays[f"{BATCH}.inputs"]).values())

    return graph_of(forward, _inputs(network, BatchShape(rows, length, 1)))


def first_look_graph(network: nn.Module, rows: int, length: int) -> Graph:
    """All logits of a few rows beside those at some positions, as `gathers` compares them once."""

    def look(**arrays: mx.array) -> list[mx.array]:
        take(network, arrays)
        ids, again, positions = (arrays[f"{BATCH}.{name}"] for name in ("inputs", "again", "positions"))
        plain = log_probabilities(plain_logits(network, ids, positions))
        gathered = log_probabilities(head_logits(network, supervised_hidden(network, again, positions)))
        return [mx.abs(plain - gathered).max()]

    inputs = _inputs(network, BatchShape(rows, length, math.ceil(rows * length / 3)))
    # Two names of the same tokens, or a trace would merge the two passes into one.
    inputs[f"{BATCH}.again"] = mx.zeros((rows, length), mx.int32)
    return graph_of(look, inputs)


def _loss_and_gradient(
    network: nn.Module, settings: TrainSettings, arrays: Mapping[str, mx.array]
) -> tuple[mx.array, Any]:
    with _recomputing(network) if settings.grad_checkpoint else _as_is():
        value, gradient = nn.value_and_grad(network, lambda: _loss(network, arrays))()
    take(network, arrays)
    return value, gradient


def _loss(network: nn.Module, arrays: Mapping[str, mx.array]) -> mx.array:
    """`summed_loss`, with custom functions as they can be traced."""
    ids, positions, targets, weights = (
        arrays[f"{BATCH}.{name}"] for name in ("inputs", "positions", "targets", "weights")
    )
    inject(network, arrays.get(f"{BATCH}.hidden"))
    hidden = supervised_hidden(network, ids, positions)
    total = mx.zeros(())
    with dequantised_once():
        for part in chunks(network, hidden):
            chunk = hidden[part]
            if part.start:
                [chunk] = mx.depends([chunk], [total])
            total = total + _chunk_loss(network, chunk, targets[part], weights[part])
    return total


def _chunk_loss(network: nn.Module, hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """As `head_loss` chooses: the gradient with the loss, or, where the head is trained, computed again."""

    def plain(hidden: mx.array) -> mx.array:
        losses = (fused_cross_entropy if on_gpu() else cross_entropy)(head_logits(network, hidden), targets)
        return mx.sum(losses * weights)

    if not network.training:
        return plain(hidden)
    if _trained_outside_layers(network):
        return _recomputed_head(network, plain, hidden)
    fixed = mx.stop_gradient(hidden)
    logits = head_logits(network, fixed)
    losses = (fused_cross_entropy if on_gpu() else cross_entropy)(logits, targets)
    _, [cotangent] = mx.vjp(lambda losses: mx.sum(losses * weights), [losses], [mx.array(1.0)])
    of_logits = (fused_gradient if on_gpu() else cross_entropy_gradient)(logits, targets, losses, cotangent)
    _, [gradient] = mx.vjp(lambda hidden: head_logits(network, hidden), [fixed], [of_logits])
    value = mx.sum(losses * weights)
    value, gradient = mx.depends([value, gradient], [hidden, targets, weights])  # one function's outputs
    return instead_of(value, mx.sum(hidden * mx.stop_gradient(gradient)))


def _recomputed_head(network: nn.Module, plain: Callable[[mx.array], mx.array], hidden: mx.array) -> mx.array:
    own = _trained_outside_layers(network)
    names = [name for name, _ in own]

    def compute(hidden: mx.array, *arrays: mx.array) -> mx.array:
        network.update(tree_unflatten(list(zip(names, arrays, strict=True))))
        try:
            return plain(hidden)
        finally:
            network.update(tree_unflatten(own))

    return recomputed(compute, hidden, *(array for _, array in own))


def _trained_outside_layers(network: nn.Module) -> list[tuple[str, mx.array]]:
    inside = {id(array) for layer in network.layers for _, array in flat(layer.trainable_parameters())}
    found: list[tuple[str, mx.array]] = flat(network.trainable_parameters())
    return [(name, array) for name, array in found if id(array) not in inside]


def _applied(
    network: nn.Module, optimizer: optim.Optimizer, settings: TrainSettings, gradient: Any
) -> list[mx.array]:
    """What `Updates` does with a gradient; all that it evaluates."""
    gradient, norm = optim.clip_grad_norm(gradient, settings.max_grad_norm or math.inf)
    optimizer.update(network, gradient)
    weights = list(adapter_weights(network).values())
    finite = mx.stack([mx.isfinite(array).all() for array in weights]).all()
    return [norm, finite, *weights, *optimizer_state(optimizer).values()]


@contextmanager
def _recomputing(network: nn.Module) -> Iterator[None]:
    """`gradient_checkpoint`, as it can be traced."""
    plain = [type(layer) for layer in network.layers]
    for layer, kind in zip(network.layers, plain, strict=True):
        layer.__class__ = type(kind.__name__, (_Recomputing, kind), {"plain": kind})
    try:
        yield
    finally:
        for layer, kind in zip(network.layers, plain, strict=True):
            layer.__class__ = kind


@contextmanager
def _as_is() -> Iterator[None]:
    yield


class _Recomputing(nn.Module):
    """Mixed in before the class of a layer, `plain`."""

    plain: type[nn.Module]

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        own = self.trainable_parameters()  # type: ignore[no-untyped-call]
        given: list[tuple[str, Any]] = flat([own, args, kwargs])
        places = [place for place, (_, leaf) in enumerate(given) if isinstance(leaf, mx.array)]

        def compute(*arrays: mx.array) -> mx.array:
            leaves = dict(given)
            leaves |= {given[place][0]: array for place, array in zip(places, arrays, strict=True)}
            trained, args, kwargs = (_under(leaves, f"{number}.") for number in range(3))
            self.update(tree_unflatten(trained) if trained else {})
            try:
                positional = [leaf for _, leaf in args]
                output: mx.array = self.plain.__call__(self, *positional, **dict(kwargs))
            finally:
                self.update(own)
            return output

        return recomputed(compute, *(given[place][1] for place in places))


def _under(leaves: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    return [(name.removeprefix(prefix), leaf) for name, leaf in leaves.items() if name.startswith(prefix)]


def _optimizer(network: nn.Module, settings: TrainSettings) -> optim.Optimizer:
    optimizer = make_optimizer(settings)
    optimizer.init(network.trainable_parameters())
    return optimizer


def _inputs(network: nn.Module, shape: BatchShape) -> dict[str, mx.array]:
    trained = adapter_weights(network)
    named = {
        f"{TRAINED if name in trained else WEIGHT}.{name}": array
        for name, array in flat(network.parameters())
    }
    return {**named, **shape.arrays(embedded(network).shape[-1])}


def embedded(network: nn.Module) -> mx.array:
    """The hidden state of one token where layers begin: its shape (1, hidden) and type are the network's."""
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    embedding = next(module for module in network.modules() if isinstance(module, kinds))
    vector: mx.array = embedding(mx.zeros((1,), mx.int32))
    return vector


def optimizer_bytes(network: nn.Module, settings: TrainSettings) -> int:
    """Of the optimizer's state."""
    return sum(array.nbytes for array in optimizer_state(_optimizer(network, settings)).values())


def _gradients(network: nn.Module) -> dict[str, mx.array]:
    return {
        f"{GRADIENT}.{name}": mx.zeros(each.shape, each.dtype)
        for name, each in adapter_weights(network).items()
    }


def _state(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    return {f"{OPTIMIZER}.{name}": array for name, array in optimizer_state(optimizer).items()}


def take(network: nn.Module, arrays: Mapping[str, mx.array]) -> None:
    """Let the network have the weights among a graph's inputs."""
    own = [
        (name.partition(".")[2], array)
        for name, array in arrays.items()
        if name.startswith((f"{WEIGHT}.", f"{TRAINED}."))
    ]
    network.update(tree_unflatten(own))


def _take_state(optimizer: optim.Optimizer, arrays: Mapping[str, mx.array]) -> None:
    flat = [
        (name.partition(".")[2], array) for name, array in arrays.items() if name.startswith(f"{OPTIMIZER}.")
    ]
    optimizer.state = tree_unflatten(flat)


def flat(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree of modules, lists and mappings, with their paths."""
    leaves: Any = tree_flatten(tree)
    return leaves  # type: ignore[no-any-return]
