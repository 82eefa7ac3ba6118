"""Products of many rows with quantised weights, on CUDA: the weights are dequantised, then multiplied.

MLX's CUDA kernels for quantised products (0.32.4) are made for the few rows of generation: from a few
hundred rows on they reach 140 TFLOP/s on an H200, where dequantising a matrix (0.07 ms) and multiplying in
bfloat16 reaches 600. The weights are dequantised again for the gradient, so that none stays in memory
between. On Metal the quantised kernels keep up, and stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx
import mlx.nn as nn

_kept: ContextVar[dict[int, mx.array] | None] = ContextVar("_kept", default=None)
"""Dequantised weights by id of their layer, while they are to be shared."""

LEAST_ROWS = 256
"""From here on; with fewer, as in generation, MLX's own kernels are as fast or faster."""


def use_dequantised_products(model: nn.Module) -> None:
    """Let the quantised layers of this one model dequantise for many rows.

    A layer's class is exchanged for a subclass, so parameters keep their names and no other model is
    touched.
    """
    for module in model.modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = _Linear
        elif type(module) is nn.QuantizedEmbedding:
            module.__class__ = _Embedding


@contextmanager
def dequantised_once() -> Iterator[None]:
    """Within the block a layer's weights are dequantised once, and kept to its end."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


class _Linear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        if _rows(x) < LEAST_ROWS:
            few: mx.array = super().__call__(x)  # type: ignore[no-untyped-call]
            return few
        y = dequantised_product(self, x)
        return y + self["bias"] if "bias" in self else y


class _Embedding(nn.QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        if _rows(x) < LEAST_ROWS:
            few: mx.array = super().as_linear(x)  # type: ignore[no-untyped-call]
            return few
        return dequantised_product(self, x)


def dequantised_product(layer: nn.Module, x: mx.array) -> mx.array:
    """x (…, inputs) times the transposed weights of a quantised layer, (…, outputs)."""

    if (kept := _kept.get()) is not None:
        if id(layer) not in kept:
            kept[id(layer)] = dequantised(layer, layer["weight"])
        return x @ kept[id(layer)].T

    # Weights that depend on what they are multiplied with are not taken for those of another pass (the
    # gradient's, a recomputation's), which would then stay in memory from the one to the other.
    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        [weight] = mx.depends([layer["weight"]], [x])
        return x @ dequantised(layer, weight).T

    @product.vjp
    def gradient(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        [weight] = mx.depends([layer["weight"]], [cotangent])
        return cotangent @ dequantised(layer, weight)

    y: mx.array = product(x)  # type: ignore[assignment]
    return y


def shares_weights() -> bool:
    """Whether this is within `dequantised_once`."""
    return _kept.get() is not None


def dequantised(layer: nn.Module, packed: mx.array) -> mx.array:
    """The weights of a layer, (outputs, inputs), from their packed form."""
    return mx.dequantize(
        packed,
        layer["scales"],
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )


def _rows(x: mx.array) -> int:
    return x.size // x.shape[-1]
