"""Recomputed activations: the same losses and gradients, less memory, no class left patched."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import FAMILIES, TINY_LLAMA, tiny_network
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

from tasks.config import TrainSettings
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter
from tasks.train.gradient_checkpoint import gradient_checkpoint

TOKENS = mx.array(np.random.default_rng(2).integers(3, 300, (2, 24)))


def adapted(kind: str, **changes: object) -> nn.Module:
    settings = TrainSettings.model_validate({"num_layers": -1, "rank": 4, **changes})
    network = tiny_network(kind)
    add_adapter(network, adapter_config(settings, 4), 0)
    for name, array in adapter_weights(network).items():
        if name.endswith("lora_b"):
            network.load_weights([(name, mx.full(array.shape, 0.01))], strict=False)
    return network


def loss_and_gradient(network: nn.Module) -> tuple[float, dict[str, mx.array], Any]:
    """With the generator's state afterwards, which dropout has moved on."""
    network.train()
    mx.random.seed(5)
    loss, gradient = nn.value_and_grad(network, lambda: mx.square(network(TOKENS)).mean())()
    mx.eval(loss, gradient)
    return loss.item(), dict(tree_flatten(gradient)), mx.random.state[0].tolist()


@pytest.mark.parametrize("method", ["lora", "dora", "full", "soft-prompt"])
@pytest.mark.parametrize("kind", list(FAMILIES))
def test_losses_and_gradients_equal_the_plain_ones(kind: str, method: str) -> None:
    network = adapted(kind, method=method)
    plain_loss, plain, _ = loss_and_gradient(network)
    with gradient_checkpoint(network):
        loss, gradient, _ = loss_and_gradient(network)
    assert loss == plain_loss
    assert plain.keys() == gradient.keys()
    for name in plain:
        assert np.allclose(np.array(plain[name]), np.array(gradient[name]), rtol=1e-5, atol=1e-7), name


def test_dropout_draws_the_same_mask_in_the_second_computation() -> None:
    network = adapted("llama", dropout=0.5)
    plain_loss, plain, plain_state = loss_and_gradient(network)
    with gradient_checkpoint(network):
        loss, gradient, state = loss_and_gradient(network)
    assert loss == plain_loss
    for name in plain:
        assert np.allclose(np.array(plain[name]), np.array(gradient[name]), rtol=1e-5, atol=1e-7), name
    assert state == plain_state


def layer_classes(network: nn.Module) -> list[type]:
    return [type(layer) for layer in network.layers]


def test_no_class_stays_patched_after_it_nor_after_an_exception_nor_when_nested() -> None:
    network, other = adapted("llama"), adapted("llama")
    plain = layer_classes(network)
    call = plain[0].__call__
    with gradient_checkpoint(network):
        once = layer_classes(network)
        assert not set(once) & set(plain)
        assert layer_classes(other) == plain
        with gradient_checkpoint(network):
            assert layer_classes(network) == once
        assert layer_classes(network) == once
    assert layer_classes(network) == plain
    with pytest.raises(KeyError), gradient_checkpoint(network):
        raise KeyError
    assert layer_classes(network) == plain
    assert plain[0].__call__ is call


def test_the_layers_hold_their_own_arrays_afterwards() -> None:
    """Arrays of the second computation would keep its graph, and so its activations, alive."""
    network = adapted("llama")
    layer = network.layers[0]
    before = layer.self_attn.q_proj.lora_a
    with gradient_checkpoint(network):
        mx.eval(mx.grad(lambda hidden: layer(hidden).sum())(mx.ones((1, 4, 32))))
    assert layer.self_attn.q_proj.lora_a is before


def test_a_deep_model_takes_less_memory() -> None:
    config = TINY_LLAMA | {"num_hidden_layers": 16, "hidden_size": 64, "intermediate_size": 256}
    network = Model(ModelArgs.from_dict(config))
    add_adapter(network, adapter_config(TrainSettings(num_layers=-1, rank=4), 16), 0)
    tokens = mx.zeros((4, 128), mx.int32)
    mx.eval(network.parameters())

    def peak_bytes() -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        start = mx.get_active_memory()
        loss, gradient = nn.value_and_grad(network, lambda: mx.square(network(tokens)).mean())()
        mx.eval(loss, gradient)
        return mx.get_peak_memory() - start

    plain = peak_bytes()
    with gradient_checkpoint(network):
        recomputed = peak_bytes()
    assert recomputed < 0.5 * plain
