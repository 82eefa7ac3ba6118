"""The CPU's own functions give what MLX's do, values and gradients, and touch no other model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import FAMILIES, tiny_network
from mlx.utils import tree_flatten

from tasks.models.cpu_functions import attention, cross_entropy, exp, softmax, swiglu, use_fast_functions


def normal(*shape: int, seed: int = 0, scale: float = 3.0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32) * scale)


def assert_alike(ours: Callable[..., mx.array], theirs: Callable[..., mx.array], *given: mx.array) -> None:
    """Equal to float32 rounding, with the gradient of a weighted sum for every argument."""
    weights = normal(*theirs(*given).shape, seed=9)
    places = list(range(len(given)))
    found = [mx.grad(lambda *a, f=f: (f(*a) * weights).sum(), argnums=places)(*given) for f in (ours, theirs)]
    assert np.allclose(np.array(ours(*given)), np.array(theirs(*given)), rtol=1e-5, atol=1e-6)
    for mine, expected in zip(*found, strict=True):
        assert mx.abs(mine - expected).max() <= 1e-5 * mx.abs(expected).max()


@pytest.mark.compiled
def test_the_exponential_is_exact_to_float32_rounding() -> None:
    x = np.linspace(-87, 88, 1_000_001, dtype=np.float32)
    expected = np.exp(x.astype(np.float64))
    for function in (exp, mx.compile(exp)):
        assert np.abs(np.array(function(mx.array(x))) / expected - 1).max() < 2e-7
    assert exp(mx.array([0.0])).item() == 1.0
    assert mx.isfinite(exp(mx.array([-1e30, -mx.inf, 1e30]))).all().item()


@pytest.mark.parametrize("masked", [False, True])
def test_softmax_is_mlxs(masked: bool) -> None:
    scores = normal(2, 3, 7, 11, scale=20.0)
    mask = mx.arange(7)[:, None] + 4 >= mx.arange(11) if masked else None
    plain = scores if mask is None else mx.where(mask, scores, -mx.inf)
    assert np.allclose(np.array(softmax(scores, mask)), np.array(mx.softmax(plain, -1)), rtol=1e-5, atol=1e-7)
    if mask is not None:
        assert mx.where(mask, 0.0, softmax(scores, mask)).max().item() == 0.0, "exactly nothing"


def test_swiglu_is_mlx_lms() -> None:
    from mlx_lm.models import activations

    assert_alike(swiglu, activations.swiglu, normal(5, 33, scale=10.0), normal(5, 33, seed=1))


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_cross_entropy_is_mlxs(scale: float) -> None:
    targets = mx.array([0, 5, 100, 7])
    assert_alike(
        lambda logits: cross_entropy(logits, targets),
        lambda logits: nn.losses.cross_entropy(logits, targets),
        normal(4, 101, scale=scale),
    )


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "of each head", "additive"])
def test_attention_is_mlx_lms(mask: str) -> None:
    from mlx_lm.models.base import scaled_dot_product_attention

    allowed = mx.array(np.random.default_rng(3).random((2, 6, 9, 9)) < 0.7) | mx.eye(9, dtype=mx.bool_)
    given: Any = {
        "none": None,
        "causal": "causal",
        "bool": allowed[0, 0],
        "of each head": allowed,
        "additive": mx.where(allowed[0, 0], 0.0, -1e9),
    }[mask]
    arrays = (normal(2, 6, 9, 8), normal(2, 2, 9, 8, seed=1), normal(2, 2, 9, 8, seed=2))
    assert_alike(
        lambda q, k, v: attention(q, k, v, None, 0.3, given),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, None, 0.3, given),
        *arrays,
    )


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_a_model_with_fast_functions_is_the_same_model(kind: str) -> None:
    plain, fast = tiny_network(kind), tiny_network(kind)
    names = [name for name, _ in tree_flatten(fast.parameters())]
    ids = mx.array(np.random.default_rng(1).integers(3, 300, (2, 20)))
    attending = type(plain.layers[0].self_attn)
    use_fast_functions(fast)
    assert type(fast.layers[0].self_attn) is not attending
    assert type(plain.layers[0].self_attn) is attending, "no other model is touched"
    assert [name for name, _ in tree_flatten(fast.parameters())] == names
    assert np.allclose(np.array(fast(ids)), np.array(plain(ids)), rtol=1e-4, atol=1e-5)
