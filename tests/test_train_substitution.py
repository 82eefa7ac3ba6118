"""A model some of whose layers are stood in for is the same model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny_networks import CONFIGS, tiny_network

from tasks.train.substitution import (
    UnfitError,
    inject,
    layers_of,
    listening,
    put_back,
    replace_prefix,
    standing_in,
)

FITTING = [kind for kind in CONFIGS if kind not in ("mamba", "rwkv7")]
"""Transformers of all kinds; of the two state-space models one hands a second array from layer to layer."""

INPUTS = mx.array(np.random.default_rng(0).integers(0, 300, (3, 24)))


class Counting(nn.Module):
    """A layer that notes that it was called."""

    def __init__(self, layer: nn.Module, place: int, calls: list[int]) -> None:
        super().__init__()
        self.layer = layer
        self._note = lambda: calls.append(place)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._note()
        return self.layer(*args, **kwargs)


def hidden_states(network: nn.Module, inputs: mx.array, depth: int) -> mx.array:
    with listening(network, [depth]) as hear:
        return hear(inputs)[depth]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("kind", FITTING)
def test_the_hidden_states_injected_give_the_plain_logits(kind: str, depth: int) -> None:
    network = tiny_network(kind)
    plain = network(INPUTS)
    hidden = hidden_states(network, INPUTS, depth)
    taken = replace_prefix(network, depth, keep=False)
    inject(network, hidden)
    assert mx.array_equal(network(mx.zeros_like(INPUTS)), plain)
    put_back(network, taken)
    assert mx.array_equal(network(INPUTS), plain)


@pytest.mark.parametrize("kind", FITTING)
def test_layers_stood_in_for_run_when_nothing_is_given(kind: str) -> None:
    network = tiny_network(kind)
    plain = network(INPUTS)
    hidden = hidden_states(network, INPUTS, 2)
    with standing_in(network, 2):
        assert mx.array_equal(network(INPUTS), plain)
        inject(network, hidden)
        assert mx.array_equal(network(mx.zeros_like(INPUTS)), plain)
        inject(network, None)
        assert mx.array_equal(network(INPUTS), plain)
    assert mx.array_equal(network(INPUTS), plain)


def test_layers_that_were_not_kept_refuse_to_run() -> None:
    network = tiny_network("llama")
    replace_prefix(network, 2, keep=False)
    with pytest.raises(RuntimeError, match="without its lower layers"):
        network(INPUTS)


def test_layers_that_were_not_kept_leave_the_memory() -> None:
    network = tiny_network("llama")
    parameters = sum(array.size for _, array in nn.utils.tree_flatten(network.parameters()))
    layer = sum(array.size for _, array in nn.utils.tree_flatten(network.layers[0].parameters()))
    replace_prefix(network, 2, keep=False)
    assert sum(a.size for _, a in nn.utils.tree_flatten(network.parameters())) == parameters - 2 * layer


def test_hidden_states_are_refused_by_a_model_that_computes_them() -> None:
    with pytest.raises(ValueError, match="computes all its layers"):
        inject(tiny_network("llama"), mx.zeros((1, 4, 32)))


def test_hidden_states_of_another_batch_are_refused() -> None:
    network = tiny_network("llama")
    with standing_in(network, 2):
        inject(network, mx.zeros((3, 20, 32)))
        with pytest.raises(ValueError, match=r"\(3, 20, 32\) are given for a batch of \(3, 24, 32\)"):
            network(INPUTS)


def test_listening_leaves_the_model_as_it_was() -> None:
    network = tiny_network("llama")
    network.train()
    before = list(network.layers)
    with listening(network, [1, 2]):
        assert not network.training
    assert network.training
    assert all(a is b for a, b in zip(network.layers, before, strict=True))


def test_no_layer_from_the_deepest_on_is_called_and_no_head() -> None:
    network = tiny_network("qwen3")
    called: list[int] = []
    layers = layers_of(network)
    layers[:] = [Counting(layer, place, called) for place, layer in enumerate(layers)]
    network.model.norm = Counting(network.model.norm, 99, called)
    with listening(network, [1, 2]) as hear:
        assert set(hear(INPUTS)) == {1, 2}
    assert called == [0, 1]


def test_layers_that_are_called_in_another_way_are_unfit() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(4, 4), nn.Linear(4, 4)]

        def __call__(self, inputs: mx.array) -> mx.array:
            hidden = mx.zeros((*inputs.shape, 4))
            for layer in self.layers:
                hidden = layer(hidden[0])[None]  # one row at a time
            return hidden

    with listening(Pairs(), [1]) as hear, pytest.raises(UnfitError, match=r"batch, length, hidden"):
        hear(INPUTS[:1])


def test_a_model_without_a_list_of_layers_is_unfit() -> None:
    class Scattered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        @property
        def layers(self) -> list[nn.Module]:
            return [self.first, self.second]

    with pytest.raises(UnfitError, match="in no list"):
        layers_of(Scattered())
