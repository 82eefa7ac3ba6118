"""Stand-ins, in a trace, for what MLX cannot export: the same arrays read, made and kept, not the same
numbers.

MLX (0.32.4) exports neither custom functions nor the gradient of fused attention. Remove these when it does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tasks.models.cpu_functions import attention, exp, scaled_powers, with_names
from tasks.models.quantised_products import LEAST_ROWS, dequantised, dequantised_product, shares_weights
from tasks.train.memory.graph import instead_of


def cpu_stand_ins() -> dict[str, Callable[..., Any]]:
    """Of the functions of `cpu_functions`, by the names that mlx-lm's layers look up."""
    return {"swiglu": swiglu, "scaled_dot_product_attention": partial(attention, normalise=softmax)}


def fused_attention_stand_in() -> dict[str, Callable[..., Any]]:
    """Of attention whose gradient is fused too."""
    return {"scaled_dot_product_attention": fused_attention}


def softmax(scores: mx.array, mask: mx.array | None = None) -> mx.array:
    """Of `cpu_functions.softmax`, whose gradient reads its output only."""
    masked = scores if mask is None else mx.where(mask, scores, -mx.inf)
    powers = scaled_powers(masked, mx.max(masked, axis=-1, keepdims=True))
    output = mx.stop_gradient(powers * (1.0 / mx.sum(powers, axis=-1, keepdims=True)))
    followed = output * (scores - mx.sum(output * scores, axis=-1, keepdims=True))
    return instead_of(output, followed, [scores])


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Of `cpu_functions.swiglu`, which keeps its inputs only."""
    fixed_gate, fixed_x = mx.stop_gradient(gate), mx.stop_gradient(x)
    sigmoid = 1.0 / (1.0 + exp(-fixed_gate))
    of_gate = fixed_x * sigmoid * (1.0 + fixed_gate * (1.0 - sigmoid))
    followed = gate * of_gate + x * (fixed_gate * sigmoid)
    return instead_of(x * gate / (1.0 + exp(-gate)), followed, [gate, x])


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Of `cpu_functions.cross_entropy`, whose gradient is made of the logits, without a softmax kept."""
    fixed = mx.stop_gradient(logits)
    highest = mx.max(fixed, axis=-1, keepdims=True)
    picked = mx.take_along_axis(fixed, targets[:, None], axis=-1)
    total = mx.sum(scaled_powers(fixed, highest), axis=-1, keepdims=True)
    losses = mx.log(total) + highest - picked
    gradient = mx.put_along_axis(scaled_powers(fixed, losses + picked), targets[:, None], picked, axis=-1)
    return instead_of(losses.squeeze(-1), mx.sum(logits * gradient, axis=-1), [logits, targets])


def fused_cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Of MLX's fused cross-entropy: the logits and a number a row are kept, their gradient is one
    operation."""
    fixed = mx.stop_gradient(logits)
    total = mx.logsumexp(fixed, axis=-1, keepdims=True)
    losses = (total - mx.take_along_axis(fixed, targets[:, None], axis=-1)).squeeze(-1)
    return instead_of(losses, mx.sum(logits * mx.exp(fixed - total), axis=-1))


def fused_gradient(logits: mx.array, targets: mx.array, losses: mx.array, cotangent: mx.array) -> mx.array:
    """Its gradient, as `cpu_functions.cross_entropy_gradient`."""
    return mx.exp(logits - losses[:, None]) * cotangent[:, None]


def use_dequantised_stand_ins(model: nn.Module) -> None:
    """Of `use_dequantised_products`."""
    for module in model.modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = _Linear
        elif type(module) is nn.QuantizedEmbedding:
            module.__class__ = _Embedding


class _Linear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        if x.size // x.shape[-1] < LEAST_ROWS:
            few: mx.array = super().__call__(x)  # type: ignore[no-untyped-call]
            return few
        y = _dequantised(self, x)
        return y + self["bias"] if "bias" in self else y


class _Embedding(nn.QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        if x.size // x.shape[-1] < LEAST_ROWS:
            few: mx.array = super().as_linear(x)  # type: ignore[no-untyped-call]
            return few
        return _dequantised(self, x)


def _dequantised(layer: nn.Module, x: mx.array) -> mx.array:
    if shares_weights():
        return dequantised_product(layer, x)
    [packed] = mx.depends([layer["weight"]], [x])
    [again] = mx.depends([layer["weight"]], [layer["scales"]])  # another than that of the forward pass
    value = x @ dequantised(layer, packed).T
    return instead_of(value, x @ dequantised(layer, again).T, [x])


def use_expert_stand_ins(model: nn.Module) -> None:
    """Of LoRA on experts, whose gradient is a product by segments."""
    from mlx_lm.tuner.lora import LoRASwitchLinear

    call: Any = LoRASwitchLinear.__call__
    traced = type(
        LoRASwitchLinear.__name__, (LoRASwitchLinear,), {"__call__": with_names(call, {"mx": _Traced()})}
    )
    for module in model.modules():
        if type(module) is LoRASwitchLinear:
            module.__class__ = traced


class _Traced:
    """`mlx.core` but for one function."""

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    def gather_mm(self, x: mx.array, weight: mx.array, **places: Any) -> mx.array:
        """(…, 1, inputs) times those of (experts, inputs, outputs) that it is routed to."""
        fixed = mx.stop_gradient(weight)
        of_weight = mx.stop_gradient(x) @ mx.sum(weight, axis=0)  # as large as the gradient of each expert
        value = mx.gather_mm(x, fixed, **places)
        return value + instead_of(mx.zeros(()), mx.sum(of_weight))


def fused_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: Any = None,
) -> mx.array:
    """Of attention by one kernel each way: (batch, heads, length, head_dim); scores are never there.

    With a cache there is no gradient, and MLX's own function stays.
    """
    if cache is not None:
        from mlx_lm.models.base import scaled_dot_product_attention

        plain: mx.array = scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
        return plain
    batch, heads, length, width = queries.shape
    groups = keys.shape[1]
    shared = queries.reshape(batch, groups, heads // groups, length, width)
    keys, values = keys[:, :, None], values[:, :, None]
    parts = ((shared, keys), (keys, values), (values, shared))
    first, second, third = (one * mx.stop_gradient(other) for one, other in parts)
    return instead_of(shared * keys * values, first + second + third).reshape(queries.shape)
