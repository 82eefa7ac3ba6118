"""Stand-ins, in a trace, for what MLX cannot export: the same arrays read, made and kept, not the same numbers.

MLX (0.32.4) exports neither custom functions nor the gradient of fused attention. Remove these when it does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from tasks.models.cpu_functions import _powers, attention, exp
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
    powers = _powers(masked, mx.max(masked, axis=-1, keepdims=True))
    output = mx.stop_gradient(powers * (1.0 / mx.sum(powers, axis=-1, keepdims=True)))
    return instead_of(output, output * (scores - mx.sum(output * scores, axis=-1, keepdims=True)))


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Of `cpu_functions.swiglu`, which keeps its inputs only."""
    fixed_gate, fixed_x = mx.stop_gradient(gate), mx.stop_gradient(x)
    sigmoid = 1.0 / (1.0 + exp(-fixed_gate))
    of_gate = fixed_x * sigmoid * (1.0 + fixed_gate * (1.0 - sigmoid))
    return instead_of(x * gate / (1.0 + exp(-gate)), gate * of_gate + x * (fixed_gate * sigmoid))


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Of `cpu_functions.cross_entropy`, whose gradient is made of the logits, without a softmax kept."""
    fixed = mx.stop_gradient(logits)
    highest = mx.max(fixed, axis=-1, keepdims=True)
    picked = mx.take_along_axis(fixed, targets[:, None], axis=-1)
    total = mx.sum(_powers(fixed, highest), axis=-1, keepdims=True)
    losses = mx.log(total) + highest - picked
    gradient = mx.put_along_axis(_powers(fixed, losses + picked), targets[:, None], picked, axis=-1)
    return instead_of(losses.squeeze(-1), mx.sum(logits * gradient, axis=-1))


def fused_attention(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> mx.array:
    """Of attention by one kernel each way: (batch, heads, length, head_dim); scores are never there."""
    batch, heads, length, width = queries.shape
    groups = keys.shape[1]
    shared = queries.reshape(batch, groups, heads // groups, length, width)
    keys, values = keys[:, :, None], values[:, :, None]
    parts = ((shared, keys), (keys, values), (values, shared))
    followed = sum(one * mx.stop_gradient(other) for one, other in parts)
    return instead_of(shared * keys * values, followed).reshape(queries.shape)
