"""Cross-entropy from hidden states, a chunk of positions at a time, so that full logits never exist.

The gradient of a chunk is computed with its loss, while its logits are there: nothing is kept for the
backward pass but an array of the size of the hidden states, and nothing is computed twice. Where the head
itself is trained, its logits are computed again for the gradient instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from tasks.models.cpu_functions import cross_entropy
from tasks.models.device import on_gpu
from tasks.models.quantised_products import dequantised_once
from tasks.train.supervised import head_logits

GPU_CHUNK_BYTES, CPU_CHUNK_BYTES = 256e6, 64e6
"""Of float32 logits. Three or four arrays of this size are alive at once on a GPU, up to fourteen on the CPU,
where MLX fuses less: there 256 MB take 60% more memory at the peak of a step, and save 2% of its time."""

ChunkLoss = Callable[[mx.array, mx.array, mx.array], mx.array]
"""(count, hidden), targets (count,) and weights (count,) to the weighted sum of their losses."""


def weighted_loss(model: nn.Module, hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Sum over positions of weight times cross-entropy in nats, a float32 scalar.

    Args:
        hidden: (count, hidden) as the head is given them.
        targets: (count,) int32 token ids.
        weights: (count,) float32.
    """
    loss = _chunk_loss(model)
    total = mx.zeros(())
    with dequantised_once():
        for part in chunks(model, hidden):
            chunk = hidden[part]
            if part.start:  # one chunk's logits at a time
                [chunk] = mx.depends([chunk], [total])
            total = total + loss(chunk, targets[part], weights[part])
    return total


def chunks(model: nn.Module, hidden: mx.array) -> list[slice]:
    """Positions of (count, hidden) in pieces of about equal size, whose logits are small enough."""
    count = len(hidden)
    vocabulary = head_logits(model, hidden[:1]).shape[-1]
    pieces = max(1, math.ceil(count * vocabulary * 4 / chunk_bytes()))
    size = math.ceil(count / pieces)
    return [slice(start, start + size) for start in range(0, count, size)]


def chunk_bytes() -> float:
    """Of a chunk's float32 logits, at most, on the device that MLX computes on."""
    return GPU_CHUNK_BYTES if on_gpu() else CPU_CHUNK_BYTES


def token_losses(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy in nats of each position, (count,), of float32 logits (count, vocabulary)."""
    losses: Any = (nn.losses.cross_entropy if on_gpu() else cross_entropy)(logits, targets)
    return losses  # type: ignore[no-any-return]


def _chunk_loss(model: nn.Module) -> ChunkLoss:
    def plain(hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        return mx.sum(token_losses(head_logits(model, hidden), targets) * weights)

    if not model.training:
        return plain
    trained = _trained_outside_layers(model)
    return _recomputed(model, plain, trained) if trained else _with_its_gradient(plain)


def _with_its_gradient(plain: ChunkLoss) -> ChunkLoss:
    @mx.custom_function
    def both(hidden: mx.array, targets: mx.array, weights: mx.array) -> Any:
        return mx.value_and_grad(plain)(hidden, targets, weights)

    @both.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        _, targets, weights = primals
        return cotangents[0] * outputs[1], mx.zeros_like(targets), mx.zeros_like(weights)

    def loss(hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        value: mx.array = both(hidden, targets, weights)[0]  # type: ignore[index]
        return value

    return loss


def _recomputed(model: nn.Module, plain: ChunkLoss, trained: Any) -> ChunkLoss:
    def with_parameters(parameters: Any, hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        model.update(parameters)
        try:  # mx.checkpoint differentiates by all it is given; MLX's cross-entropy refuses that of targets
            return plain(hidden, mx.stop_gradient(targets), weights)
        finally:
            model.update(trained)

    def loss(*given: mx.array) -> mx.array:
        value: mx.array = mx.checkpoint(with_parameters)(trained, *given)
        return value

    return loss


def _trained_outside_layers(model: nn.Module) -> Any:
    """The tree of trainable parameters that are in no layer: embeddings, last norm and head among them."""
    inside = {id(array) for layer in model.layers for _, array in _flat(layer)}
    outside = [(name, array) for name, array in _flat(model) if id(array) not in inside]
    return tree_unflatten(outside) if outside else None


def _flat(module: nn.Module) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(module.trainable_parameters())
    return flat  # type: ignore[no-any-return]
