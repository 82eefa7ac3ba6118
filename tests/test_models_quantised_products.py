"""Dequantised products are the quantised ones, gradient included, and nothing dequantised is kept."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import tiny_network

from tasks.models import quantised_products
from tasks.models.quantised_products import LEAST_ROWS, dequantised_once, use_dequantised_products
from tasks.prepare.splits import TokenRows
from tasks.train import head_loss
from tasks.train.adapters import adapter_weights, add_adapter
from tasks.train.batches import collate
from tasks.train.loss import summed_loss

ADAPTER = {
    "fine_tune_type": "lora",
    "num_layers": 2,
    "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0},
}


@pytest.fixture
def dequantised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers each dequantising gave, as it is called for."""
    given: list[int] = []
    plain = mx.dequantize

    def counted(*args: Any, **kwargs: Any) -> mx.array:
        array = plain(*args, **kwargs)
        given.append(array.size)
        return array

    monkeypatch.setattr(mx, "dequantize", counted)
    return given


@pytest.mark.parametrize("bias", [False, True])
def test_many_rows_give_what_the_quantised_kernel_gives_and_few_are_left_to_it(
    bias: bool, dequantised: list[int]
) -> None:
    mx.random.seed(3)
    layer = nn.QuantizedLinear(64, 32, bias=bias, group_size=32, bits=4)
    x = mx.random.normal((2, LEAST_ROWS // 2, 64))
    weight = mx.random.normal((32,))

    def product(x: mx.array) -> mx.array:
        return (layer(x) * weight).sum()

    expected, slope = mx.value_and_grad(product)(x)
    alone = nn.Sequential(layer)
    use_dequantised_products(alone)
    assert isinstance(layer, nn.QuantizedLinear), "mlx-lm and fusing know it by that"
    assert not dequantised
    found, gradient = mx.value_and_grad(product)(x)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert np.allclose(gradient, slope, atol=1e-5)
    assert dequantised == [64 * 32, 64 * 32], "once forward, once for the gradient"
    dequantised.clear()
    layer(x[:, :-1])
    assert not dequantised


def test_a_quantised_model_trains_as_with_its_own_kernels_and_its_head_is_dequantised_once(
    token_rows: TokenRows, monkeypatch: pytest.MonkeyPatch, dequantised: list[int]
) -> None:
    monkeypatch.setattr(quantised_products, "LEAST_ROWS", 1)
    monkeypatch.setattr(head_loss, "chunk_bytes", lambda: 320 * 4 * 16)  # sixteen positions at a time
    batch = collate(token_rows, np.arange(len(token_rows)))
    found = []
    for fast in (False, True):
        network = tiny_network(bits=4)
        if fast:
            use_dequantised_products(network)
        add_adapter(network, ADAPTER, seed=1)
        network.load_weights(
            [(name, array + 0.01) for name, array in adapter_weights(network).items()], strict=False
        )
        network.train()
        dequantised.clear()
        loss, gradient = nn.value_and_grad(network, lambda: summed_loss(network, *batch.arrays()))()  # noqa: B023
        found.append((loss.item(), gradient["model"]["layers"][3]["self_attn"]["q_proj"]["lora_b"]))
    (plain, slope), (loss, gradient) = found
    assert loss == pytest.approx(plain, rel=1e-5)
    assert np.allclose(gradient, slope, atol=1e-4)
    head = 320 * 32
    assert batch.supervised_tokens > 4 * 16
    assert dequantised.count(head) == 1


def test_what_is_kept_for_a_block_is_let_go_after_it(dequantised: list[int]) -> None:
    layer = nn.QuantizedLinear(64, 32, group_size=32, bits=4)
    use_dequantised_products(nn.Sequential(layer))
    x = mx.ones((LEAST_ROWS, 64))
    with dequantised_once():
        assert np.allclose(layer(x), layer(x))
        assert len(dequantised) == 1
    layer(x)
    assert len(dequantised) == 2


@pytest.mark.compiled
def test_recomputing_keeps_nothing_dequantised_from_one_pass_to_the_next() -> None:
    """Twelve matrices of 4 MB dequantised; MLX may have half of them under way at once."""
    size, count = 1024, 12
    layers = [nn.QuantizedLinear(size, size, bias=False, group_size=64, bits=4) for _ in range(count)]
    use_dequantised_products(nn.Sequential(*layers))
    mx.eval([layer.parameters() for layer in layers])

    def loss(x: mx.array) -> mx.array:
        for layer in layers:
            x = mx.checkpoint(lambda x, layer=layer: mx.tanh(layer(x)) + x)(x)
        return x.sum()

    compute = mx.compile(mx.grad(loss))
    x = mx.zeros((LEAST_ROWS, size))
    mx.eval(compute(x))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(compute(x))
    activations = count * x.nbytes
    assert mx.get_peak_memory() - before - activations < 0.75 * count * 4 * size * size
