"""Exponentials on the CPU at the speed of multiplications, for mlx-lm's own layer code.

MLX (0.32.4) calls the C library's `exp` for one element after another on x86: 13 ns each, so that in a
135M model the activation and the attention's softmax cost more than all matrix products. A polynomial of
multiplications and additions, which the compiler turns into vector instructions, takes 2 ns and is as
exact in float32. On a GPU, and for anything but float32, MLX's own functions stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    import mlx.nn as nn

LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
"""ln 2 in two parts, the first exact in few bits: k times it has no rounding error (Cody and Waite 1980)."""

POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
"""(e^r - 1 - r) / r² for |r| <= ln 2 / 2, highest power first: that of `expf` in Cephes (Moshier 1989)."""

ROUND = 1.5 * 2**23
"""Added to a small float32 and taken away again it rounds to a whole number, held in the lowest bits."""

LOWEST, HIGHEST = -87.0, 88.0
"""Where e^x is a normal float32."""


def use_fast_functions(model: nn.Module, others: Mapping[str, Callable[..., Any]] | None = None) -> None:
    """Let the layers of this one model call the functions of this module in place of mlx-lm's.

    A layer's class is exchanged for a subclass whose `__call__` is the same code with other functions
    under the names that it looks up; parameters keep their names and no other model is touched.

    Args:
        others: in place of this module's, by the names that layers look up.
    """
    replacements = {
        name: (plain, made if others is None else others.get(name, plain))
        for name, (plain, made) in _replacements().items()
    }
    modules: Any = model.modules()
    for kind in {type(module) for module in modules}:
        call = kind.__call__
        if not isinstance(call, FunctionType):
            continue
        names = {
            name: made
            for name, (plain, made) in replacements.items()
            if name in call.__code__.co_names and call.__globals__.get(name) is plain
        }
        if names:
            ours = type(kind.__name__, (kind,), {"__call__": with_names(call, names)})
            for module in modules:
                if type(module) is kind:
                    module.__class__ = ours


def exp(x: mx.array) -> mx.array:
    """e^x of float32 with a relative error of 1e-7; below -87 and above 88 as there."""
    x = mx.clip(x, LOWEST, HIGHEST)
    shifted = x * 1.4426950408889634 + ROUND  # x / ln 2, rounded, in the lowest bits
    whole = shifted - ROUND
    rest = x - whole * LN2_HIGH - whole * LN2_LOW
    value = rest * POLYNOMIAL[0] + POLYNOMIAL[1]
    for coefficient in POLYNOMIAL[2:]:
        value = value * rest + coefficient
    exponent = mx.left_shift(shifted.view(mx.int32), 23) + (127 << 23)
    return (value * rest * rest + rest + 1.0) * exponent.view(mx.float32)


def softmax(scores: mx.array, mask: mx.array | None = None) -> mx.array:
    """Softmax over the last axis of float32, where `mask` is true if it is given."""

    @mx.custom_function
    def masked(scores: mx.array) -> mx.array:
        if mask is not None:
            scores = mx.where(mask, scores, -mx.inf)
        powers = scaled_powers(scores, mx.max(scores, axis=-1, keepdims=True))
        return powers * (1.0 / mx.sum(powers, axis=-1, keepdims=True))

    @masked.vjp
    def gradient(primals: Any, cotangent: mx.array, output: mx.array) -> mx.array:
        weighted = mx.sum(output * cotangent, axis=-1, keepdims=True)
        return _softmax_gradient(output, cotangent, weighted)

    weights: Any = masked(scores)
    return weights  # type: ignore[no-any-return]


@mx.custom_function
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """x · gate · sigmoid(gate), as mlx_lm.models.activations.swiglu."""
    return _swiglu(gate, x)


@swiglu.vjp
def _(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    gate, x = primals
    return _swiglu_gradient(gate, x, cotangent)


@mx.custom_function
def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy in nats, (count,), of float32 logits (count, vocabulary)."""
    highest = mx.max(logits, axis=-1, keepdims=True)
    total = mx.sum(scaled_powers(logits, highest), axis=-1, keepdims=True)
    return (mx.log(total) + highest - _picked(logits, targets)).squeeze(-1)


@cross_entropy.vjp
def _(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    logits, targets = primals
    return cross_entropy_gradient(logits, targets, output, cotangent), mx.zeros_like(targets)


def cross_entropy_gradient(
    logits: mx.array, targets: mx.array, losses: mx.array, cotangent: mx.array
) -> mx.array:
    """Of logits (count, vocabulary), in their shape, from the losses that they gave, (count,)."""
    weights = cotangent[:, None]
    # The logarithm of the sum of powers is the loss and the target's logit together.
    gradient = scaled_powers(logits, losses[:, None] + _picked(logits, targets)) * weights
    of_targets = _picked(gradient, targets) - weights
    return mx.put_along_axis(gradient, targets[:, None], of_targets, axis=-1)


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
    normalise: Callable[..., mx.array] | None = None,
) -> mx.array:
    """As mlx_lm.models.base.scaled_dot_product_attention: (batch, heads, length, head_dim) throughout.

    Without a cache, that is for losses and their gradients; answers are generated by mlx-lm's.

    Args:
        normalise: in place of `softmax`.
    """
    additive = isinstance(mask, mx.array) and mask.dtype != mx.bool_
    if cache is not None or sinks is not None or additive or queries.dtype != mx.float32:
        plain, _ = _replacements()["scaled_dot_product_attention"]
        return plain(queries, keys, values, cache, scale, mask, sinks)
    batch, heads, length, width = queries.shape
    groups, keys_length = keys.shape[1], keys.shape[2]
    if isinstance(mask, str):  # "causal"
        mask = mx.arange(keys_length - length, keys_length)[:, None] >= mx.arange(keys_length)
    elif mask is not None and mask.ndim == 4 and mask.shape[1] > 1:  # of each head
        mask = mask.reshape(mask.shape[0], groups, -1, *mask.shape[2:])
    elif mask is not None and mask.ndim == 4:
        mask = mask[:, None]
    # The heads that share keys are rows of one product: (batch, groups, heads/groups · length, head_dim).
    shared = (queries * scale).reshape(batch, groups, -1, width)
    scores = (shared @ keys.swapaxes(-1, -2)).reshape(batch, groups, -1, length, keys_length)
    weights = (normalise or softmax)(scores, mask).reshape(batch, groups, -1, keys_length)
    return (weights @ values).reshape(batch, heads, length, -1)


def _picked(values: mx.array, targets: mx.array) -> mx.array:
    """(count, 1): of each row of (count, vocabulary) the value at its target."""
    return mx.take_along_axis(values, targets[:, None], axis=-1)


@mx.compile
def scaled_powers(scores: mx.array, highest: mx.array) -> mx.array:
    """e^(scores - highest), exactly 0 where that is too small to count: 2^-53 is a rounding of the sum."""
    shifted = scores - highest
    return mx.where(shifted > -60.0, exp(shifted), 0.0)


@mx.compile
def _softmax_gradient(output: mx.array, cotangent: mx.array, weighted: mx.array) -> mx.array:
    return output * (cotangent - weighted)


@mx.compile
def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return x * gate / (1.0 + exp(-gate))


@mx.compile
def _swiglu_gradient(gate: mx.array, x: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = 1.0 / (1.0 + exp(-gate))
    return cotangent * x * sigmoid * (1.0 + gate * (1.0 - sigmoid)), cotangent * gate * sigmoid


def _replacements() -> dict[str, tuple[Callable[..., mx.array], Any]]:
    """By the name that layers look up: mlx-lm's function, and the one of this module."""
    from mlx_lm.models import activations, base

    return {
        "swiglu": (activations.swiglu, swiglu),
        "scaled_dot_product_attention": (base.scaled_dot_product_attention, attention),
    }


def with_names(call: FunctionType, names: dict[str, Any]) -> FunctionType:
    """The same code, with other objects under some of its global names."""
    scope = {**call.__globals__, **names}
    made = FunctionType(call.__code__, scope, call.__name__, call.__defaults__, call.__closure__)
    made.__kwdefaults__ = call.__kwdefaults__
    return made
