"""Optimizers by name: restorable to the byte, each group at its own rate, muon and decay as meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import tiny_network
from mlx.utils import tree_flatten, tree_unflatten

from tasks.config import TrainSettings
from tasks.errors import StepError
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter
from tasks.train.optimizers import make_optimizer, optimizer_state, restore_optimizer, set_learning_rate

OPTIMIZERS = ["adamw", "adam", "sgd", "adafactor", "muon", "lion"]


def settings_of(optimizer: str, **changes: object) -> TrainSettings:
    return TrainSettings.model_validate({"optimizer": optimizer, "num_layers": 2, "rank": 4, **changes})


def network_for(settings: TrainSettings) -> nn.Module:
    network = tiny_network()
    add_adapter(network, adapter_config(settings, 4), settings.seed)
    return network


def gradient_of(network: nn.Module, step: int) -> Any:
    """A random gradient of the shape of the trainable parameters."""
    random = np.random.default_rng(step)
    weights = adapter_weights(network)
    return tree_unflatten(
        [(n, mx.array(random.normal(size=a.shape).astype(np.float32))) for n, a in weights.items()]
    )


def run(network: nn.Module, optimizer: optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_learning_rate(optimizer, 1e-2 / step)
        optimizer.update(network, gradient_of(network, step))
        mx.eval(network.parameters(), optimizer.state)


def same_bytes(left: dict[str, mx.array], right: dict[str, mx.array]) -> bool:
    return left.keys() == right.keys() and all(
        np.array(left[name]).tobytes() == np.array(right[name]).tobytes() for name in left
    )


@pytest.mark.parametrize("ratio", [1.0, 4.0], ids=["", "lora+"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_and_three_restored_updates_equal_six_straight_ones(
    name: str, ratio: float, tmp_path: Path
) -> None:
    settings = settings_of(name, lora_plus_ratio=ratio)
    straight = network_for(settings)
    optimizer = make_optimizer(settings)
    run(straight, optimizer, range(1, 7))

    first = network_for(settings)
    halfway = make_optimizer(settings)
    run(first, halfway, range(1, 4))
    mx.save_safetensors(str(tmp_path / "optimizer.safetensors"), optimizer_state(halfway))
    resumed, again = network_for(settings), make_optimizer(settings)
    resumed.load_weights(list(adapter_weights(first).items()), strict=False)
    restore_optimizer(again, resumed, mx.load(str(tmp_path / "optimizer.safetensors")))
    assert same_bytes(optimizer_state(again), optimizer_state(halfway))
    run(resumed, again, range(4, 7))
    assert same_bytes(adapter_weights(resumed), adapter_weights(straight))
    assert same_bytes(optimizer_state(again), optimizer_state(optimizer))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_everything_is_restored_too(name: str) -> None:
    settings = settings_of(name, method="full", num_layers=-1)
    straight, optimizer = network_for(settings), make_optimizer(settings)
    run(straight, optimizer, range(1, 5))
    first, halfway = network_for(settings), make_optimizer(settings)
    run(first, halfway, range(1, 3))
    again = make_optimizer(settings)
    restore_optimizer(again, first, optimizer_state(halfway))
    run(first, again, range(3, 5))
    assert same_bytes(adapter_weights(first), adapter_weights(straight))


@pytest.mark.parametrize("ratio", [1.0, 4.0], ids=["", "lora+"])
def test_an_optimizer_saved_before_its_first_update_is_restored(ratio: float) -> None:
    settings = settings_of("adamw", lora_plus_ratio=ratio)
    straight, resumed = network_for(settings), network_for(settings)
    run(straight, make_optimizer(settings), range(1, 3))
    optimizer = make_optimizer(settings)
    restore_optimizer(optimizer, resumed, optimizer_state(make_optimizer(settings)))
    run(resumed, optimizer, range(1, 3))
    assert same_bytes(adapter_weights(resumed), adapter_weights(straight))


def test_state_of_another_optimizer_or_of_other_parameters_is_refused() -> None:
    settings = settings_of("adamw")
    network, optimizer = network_for(settings), make_optimizer(settings)
    run(network, optimizer, range(1, 2))
    with pytest.raises(StepError, match="another run"):
        restore_optimizer(make_optimizer(settings_of("lion")), network, optimizer_state(optimizer))
    wider = network_for(settings_of("adamw", rank=8))
    with pytest.raises(StepError, match=r"is \(64, 4\), expected \(64, 8\)"):
        restore_optimizer(make_optimizer(settings), wider, optimizer_state(optimizer))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_plus_moves_b_faster_and_all_else_as_before(method: str) -> None:
    changes: dict[str, object] = {"method": method, "learning_rate": 1e-2}
    plain, faster = settings_of("adamw", **changes), settings_of("adamw", **changes, lora_plus_ratio=4)
    moved = []
    for settings in (plain, faster):
        network = network_for(settings)
        before = adapter_weights(network)
        run(network, make_optimizer(settings), range(1, 2))
        after = adapter_weights(network)
        moved.append({name: np.array(after[name] - before[name]) for name in before})
    for name in moved[0]:
        ratio = 4 if name.endswith("lora_b") else 1
        assert np.allclose(moved[1][name], ratio * moved[0][name], rtol=1e-4, atol=1e-6), name
    assert {name.rpartition(".")[2] for name in moved[0]} >= {"lora_a", "lora_b"}


def test_the_rate_of_a_grouped_optimizer_is_that_of_the_settings() -> None:
    optimizer = make_optimizer(settings_of("adamw", lora_plus_ratio=16))
    set_learning_rate(optimizer, 1e-3)
    assert float(optimizer.learning_rate) == pytest.approx(1e-3)
    rates = [float(part["learning_rate"]) for part in optimizer.state["states"]]
    assert rates == pytest.approx([16e-3, 1e-3])


def test_muon_takes_hidden_matrices_and_leaves_embeddings_head_and_vectors_to_adamw() -> None:
    network = tiny_network("mistral")
    settings = settings_of("muon", method="full", num_layers=-1)
    add_adapter(network, adapter_config(settings, 4), 0)
    optimizer = make_optimizer(settings)
    run(network, optimizer, range(1, 2))
    _, hidden, rest = (dict(tree_flatten(part)) for part in optimizer.state["states"])
    by_muon = {name.rpartition(".")[0] for name in hidden if name.endswith(".v")}
    by_adamw = {name.rpartition(".")[0] for name in rest if name.endswith(".m")}
    weights = adapter_weights(network)
    beside = {"model.embed_tokens.weight", "lm_head.weight"}
    assert by_muon == {name for name, array in weights.items() if array.ndim == 2} - beside
    assert by_adamw == beside | {name for name, array in weights.items() if array.ndim == 1}


@pytest.mark.parametrize("rank", [4, 40])
def test_muon_scales_loras_matrices_as_the_linear_layers_they_are(rank: int) -> None:
    """An update is orthogonal, all its singular values about 1, times √(outputs / inputs) where over 1."""
    settings = settings_of("muon", rank=rank)
    network, optimizer = network_for(settings), make_optimizer(settings)
    before = adapter_weights(network)
    set_learning_rate(optimizer, 1.0)
    optimizer.update(network, gradient_of(network, 1))
    for name, array in adapter_weights(network).items():
        inputs, outputs = array.shape
        values = np.linalg.svd(np.array(array - before[name]), compute_uv=False)
        scale = max(1, outputs / inputs) ** 0.5
        assert 0.6 * scale < np.median(values) < 1.3 * scale, name


def decay_of(name: str, **changes: object) -> np.ndarray:
    """What is left of a matrix of ones after an update of gradient zero at rate 0.1 and decay 0.5."""
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = mx.ones((4, 4))
    holder = nn.Sequential(layer)
    optimizer = make_optimizer(settings_of(name, weight_decay=0.5, **changes))
    set_learning_rate(optimizer, 0.1)
    optimizer.update(holder, {"layers": [{"weight": mx.zeros((4, 4))}]})
    return np.array(layer.weight)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "muon", "lion"])
def test_weight_decay_shrinks_by_rate_times_decay(name: str) -> None:
    assert np.allclose(decay_of(name), 1 - 0.1 * 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"), [("adamw", 1.0), ("adam", 1.0), ("lion", 1.0), ("adafactor", 1.0), ("sgd", 3.0)]
)
def test_the_first_update_is_of_the_size_its_paper_gives(name: str, expected: float) -> None:
    """Adam (bias-corrected), Lion and Adafactor step by the rate; SGD by rate · gradient."""
    layer = nn.Linear(4, 4, bias=False)
    before = np.array(layer.weight)
    optimizer = make_optimizer(settings_of(name))
    set_learning_rate(optimizer, 0.1)
    optimizer.update(layer, {"weight": mx.full((4, 4), 3.0)})
    assert np.allclose(before - np.array(layer.weight), 0.1 * expected, rtol=1e-4)


def test_sgd_has_momentum() -> None:
    layer = nn.Linear(4, 4, bias=False)
    before = np.array(layer.weight)
    optimizer = make_optimizer(settings_of("sgd"))
    set_learning_rate(optimizer, 0.1)
    for _ in range(2):
        optimizer.update(layer, {"weight": mx.ones((4, 4))})
    assert np.allclose(before - np.array(layer.weight), 0.1 * (1 + 1.9), rtol=1e-4)
