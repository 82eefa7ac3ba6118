"""What each method trains, and its files: read by mlx-lm as they are, and by us only when whole."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import FAMILIES, tiny_network
from mlx.utils import tree_flatten

from tasks.config import TrainSettings
from tasks.errors import InputError
from tasks.train.adapters import (
    CONFIG_FILE,
    adapter_config,
    adapter_weights,
    add_adapter,
    count_parameters,
    load_adapter,
    save_adapter,
)
from tasks.train.quantised_base import check_base
from tasks.train.targets import target_keys

TOKENS = mx.array([[5, 6, 7, 8, 9, 10]])


def settings_of(method: str = "lora", **changes: object) -> TrainSettings:
    return TrainSettings.model_validate({"method": method, "num_layers": 2, "rank": 4, **changes})


def config_of(network: nn.Module, settings: TrainSettings) -> dict[str, Any]:
    return adapter_config(settings, 4, target_keys(network, settings.targets, settings.num_layers))


def adapted(settings: TrainSettings, kind: str = "llama", bits: int | None = None) -> nn.Module:
    network = tiny_network(kind, bits)
    add_adapter(network, config_of(network, settings), settings.seed)
    return network


def trained(settings: TrainSettings, kind: str = "llama", bits: int | None = None) -> nn.Module:
    """With random weights in place of trained ones."""
    network = adapted(settings, kind, bits)
    random = np.random.default_rng(1)
    weights = [
        (name, array + mx.array(random.normal(0, 0.05, array.shape)).astype(array.dtype))
        for name, array in adapter_weights(network).items()
    ]
    network.load_weights(weights, strict=False)
    network.eval()
    return network


def saved(folder: Path, settings: TrainSettings, kind: str = "llama", bits: int | None = None) -> nn.Module:
    network = trained(settings, kind, bits)
    save_adapter(folder, adapter_weights(network), config_of(tiny_network(kind, bits), settings))
    return network


def logits(network: nn.Module) -> np.ndarray:
    network.eval()
    return np.array(network(TOKENS))


@pytest.mark.parametrize(
    ("method", "bits"), [("lora", None), ("lora", 4), ("dora", None), ("dora", 4), ("full", None)]
)
@pytest.mark.parametrize("kind", list(FAMILIES))
def test_mlx_lm_loads_the_folder_as_it_is_and_gives_our_logits(
    tmp_path: Path, kind: str, method: str, bits: int | None
) -> None:
    from mlx_lm.tuner.utils import load_adapters

    targets = ("q_proj", "v_proj") if kind == "llama" else ("all-linear",)
    expected = logits(saved(tmp_path, settings_of(method, targets=targets), kind, bits))
    theirs, ours = tiny_network(kind, bits), tiny_network(kind, bits)
    assert not np.allclose(logits(theirs), expected, atol=1e-3)
    assert np.array_equal(logits(load_adapters(theirs, str(tmp_path))), expected)
    load_adapter(ours, tmp_path)
    assert np.array_equal(logits(ours), expected)


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_the_loader_behind_mlx_lms_generate_fuse_and_server_takes_base_and_adapter(
    tmp_path: Path, tiny_model: Any, method: str
) -> None:
    from mlx_lm import load

    from tasks.models.load import load_model

    network = load_model(tiny_model.path).model
    settings = settings_of(method, num_layers=-1, targets=("attention",))
    config = config_of(network, settings)
    add_adapter(network, config, 3)
    weights = {name: array + 0.02 for name, array in adapter_weights(network).items()}
    network.load_weights(list(weights.items()), strict=False)
    save_adapter(tmp_path, weights, config)
    theirs, _ = load(str(tiny_model.path), adapter_path=str(tmp_path))
    # Ours computes its exponentials in another way on a CPU, to rounding.
    assert np.allclose(logits(theirs), logits(network), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_low_rank_matrices_are_float32_on_a_base_of_half_precision(method: str, dtype: str) -> None:
    network = tiny_network(dtype=dtype)
    add_adapter(network, adapter_config(settings_of(method), 4), 0)
    assert {array.dtype for array in adapter_weights(network).values()} == {mx.float32}
    assert network(TOKENS).dtype == getattr(mx, dtype)


@pytest.mark.parametrize("method", ["lora", "dora", "full", "soft-prompt"])
def test_a_new_adapter_leaves_the_model_as_it_was_and_depends_on_its_seed_alone(method: str) -> None:
    adapter = adapted(settings_of(method))
    assert np.allclose(logits(adapter), logits(tiny_network()), atol=1e-6)
    mx.random.seed(99)
    again, other = adapted(settings_of(method)), adapted(settings_of(method, seed=5))

    def same(left: nn.Module, right: nn.Module) -> bool:
        pairs = zip(adapter_weights(left).items(), adapter_weights(right).items(), strict=True)
        return all(a == b and np.array_equal(np.array(x), np.array(y)) for (a, x), (b, y) in pairs)

    assert same(adapter, again)
    assert same(adapter, other) == (method == "full")


def test_what_is_drawn_depends_on_names_and_not_on_the_order_of_modules() -> None:
    turned = tiny_network()
    for layer in turned.layers:
        layer.self_attn = layer.pop("self_attn")
    assert list(turned.layers[0]) != list(tiny_network().layers[0])
    add_adapter(turned, config_of(turned, settings_of()), 0)
    for name, array in adapter_weights(adapted(settings_of())).items():
        assert mx.array_equal(array, adapter_weights(turned)[name]), name


def test_a_is_drawn_in_the_bounds_of_the_input_width() -> None:
    for name, array in adapter_weights(adapted(settings_of(rank=16))).items():
        if name.endswith("lora_a"):
            bound = 1 / math.sqrt(array.shape[0])
            assert 0.9 * bound < float(mx.abs(array).max()) <= bound, name


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"alpha": 32, "rank": 8}, 4.0),
        ({"alpha": 32, "rank": 16, "rank_stabilized": True}, 8.0),
        ({"alpha": 32, "rank": 8, "scale": 20}, 20.0),
        ({"alpha": 32, "rank": 16, "rank_stabilized": True, "scale": 0.5}, 0.5),
    ],
)
def test_scale_is_alpha_over_rank_or_over_its_root_or_given(changes: dict[str, Any], scale: float) -> None:
    config = adapter_config(settings_of(**changes), 4)
    assert config["lora_parameters"]["scale"] == scale
    network = tiny_network()
    add_adapter(network, config, 0)
    assert network.layers[3].self_attn.q_proj.scale == scale


def test_dropout_is_of_the_adapters_input_and_only_in_training() -> None:
    network = trained(settings_of(dropout=0.5))
    quiet = logits(network)
    assert np.array_equal(quiet, logits(trained(settings_of(dropout=0.0))))
    network.train()
    assert not np.array_equal(np.array(network(TOKENS)), quiet)


ALL_SEVEN = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"] + [
    f"self_attn.{name}_proj" for name in ("k", "o", "q", "v")
]


@pytest.mark.parametrize(
    ("targets", "keys"),
    [
        (["q_proj"], ["self_attn.q_proj"]),
        (["v_proj", "q_proj"], ["self_attn.q_proj", "self_attn.v_proj"]),
        (["self_attn.o_proj"], ["self_attn.o_proj"]),
        (["attention"], ALL_SEVEN[3:]),
        (["mlp"], ALL_SEVEN[:3]),
        (["mlp", "q_proj", "up_proj"], [*ALL_SEVEN[:3], "self_attn.q_proj"]),
        (["all-linear"], ALL_SEVEN),
    ],
)
@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "quantised"])
def test_targets_are_names_paths_and_groups(targets: list[str], keys: list[str], bits: int | None) -> None:
    assert target_keys(tiny_network(bits=bits), targets) == keys
    network = adapted(settings_of(targets=tuple(targets)), bits=bits)
    wrapped = {name.rpartition(".")[0] for name in adapter_weights(network)}
    assert wrapped == {f"model.layers.{layer}.{key}" for layer in (2, 3) for key in keys}


@pytest.mark.parametrize("target", ["query", "proj", "q_norm", "embed_tokens", "self_attn"])
def test_a_name_that_is_no_module_is_refused_with_those_of_the_model(target: str) -> None:
    with pytest.raises(InputError, match=rf"no '{target}' .* down_proj, gate_proj, k_proj, .* all-linear"):
        target_keys(tiny_network("qwen3"), [target, "q_proj"])


def test_modules_are_looked_for_in_the_layers_adapted() -> None:
    """Hybrid models: a name that only other layers have would adapt nothing."""
    network = tiny_network()
    network.layers[0].extra_proj = nn.Linear(32, 32)
    assert target_keys(network, ["extra_proj"]) == ["extra_proj"]
    with pytest.raises(InputError, match="no 'extra_proj'"):
        target_keys(network, ["extra_proj"], num_layers=3)


def test_named_modules_need_their_keys() -> None:
    with pytest.raises(ValueError, match="give their keys"):
        adapter_config(settings_of(targets=("q_proj",)), 4)


def test_full_training_is_of_the_last_layers_or_of_everything() -> None:
    network = tiny_network("mistral")
    everything = dict(tree_flatten(network.parameters()))
    last = adapter_weights(adapted(settings_of("full"), "mistral"))
    assert set(last) == {name for name in everything if ".layers.2." in name or ".layers.3." in name}
    assert adapter_weights(adapted(settings_of("full", num_layers=-1), "mistral")).keys() == everything.keys()


def test_experts_are_adapted_by_lora_with_the_bound_of_their_inputs_and_not_by_dora() -> None:
    from mlx_lm.models.switch_layers import SwitchLinear

    network = tiny_network()
    for layer in network.layers:
        layer.mlp.experts_proj = SwitchLinear(64, 32, 3, bias=False)
    settings = settings_of(targets=("experts_proj",))
    config = config_of(network, settings)
    with pytest.raises(InputError, match="layers of experts"):
        add_adapter(network, config | {"fine_tune_type": "dora"}, 0)
    add_adapter(network, config, 0)
    down = network.layers[3].mlp.experts_proj.lora_a  # (experts, rank, inputs)
    assert down.shape == (3, 4, 64)
    assert 0.9 / 8 < float(mx.abs(down).max()) <= 1 / 8


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_dora_is_refused_on_the_bits_that_mlx_lm_cannot_load(bits: int) -> None:
    config = {"quantization": {"bits": bits, "group_size": 32}}
    if bits in (2, 4, 8):
        check_base("dora", config)
        assert logits(trained(settings_of("dora"), bits=bits)).shape == (1, 6, 320)
        return
    with pytest.raises(InputError, match=f"base of {bits} bits"):
        check_base("dora", config)
    with pytest.raises(InputError, match=f"base of {bits} bits"):
        adapted(settings_of("dora"), bits=bits)
    check_base("lora", config)
    assert logits(trained(settings_of("lora"), bits=bits)).shape == (1, 6, 320)


def test_a_layer_of_other_bits_than_the_rest_counts_too() -> None:
    config = {"quantization": {"bits": 4, "group_size": 32, "model.layers.0.mlp.up_proj": {"bits": 6}}}
    with pytest.raises(InputError, match="base of 6 bits"):
        check_base("dora", config)


@pytest.mark.parametrize("num_layers", [2, -1])
def test_full_training_of_a_quantised_base_is_refused(num_layers: int) -> None:
    with pytest.raises(InputError, match="quantised weights cannot be trained"):
        adapted(settings_of("full", num_layers=num_layers), bits=4)
    for key in ("quantization", "quantization_config"):
        with pytest.raises(InputError, match="quantised weights cannot be trained"):
            check_base("full", {key: {"quant_method": "awq"}})
    check_base("full", {})


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    change(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(fine_tune_type="magic"), "fine_tune_type = 'magic'; it can be lora, dora, full"),
        (lambda c: c.update(num_layers=0), "num_layers = 0; expected"),
        (lambda c: c.update(num_layers=-1), "num_layers = -1; expected"),
        (lambda c: c.update(num_layers=9), "num_layers = 9, the base model has 4"),
        (lambda c: c.pop("num_layers"), "num_layers = None"),
        (lambda c: c.pop("lora_parameters"), "lora_parameters need"),
        (lambda c: c["lora_parameters"].pop("scale"), "lora_parameters need"),
        (lambda c: c["lora_parameters"].update(scale=1e30), r"scale = 1e\+30"),
        (lambda c: c["lora_parameters"].update(scale=math.nan), "scale = nan"),
        (lambda c: c["lora_parameters"].update(rank=0), "rank = 0"),
        (lambda c: c["lora_parameters"].update(rank=8), r"is \(64, 4\), expected \(64, 8\)"),
        (lambda c: c["lora_parameters"].update(keys=["self_attn.q_proj"]), "tensors missing or unknown"),
        (lambda c: c.update(fine_tune_type="dora"), "tensors missing or unknown, first .*\\.m$"),
        (lambda c: c.update(fine_tune_type="full"), "tensors missing or unknown"),
    ],
)
def test_a_config_that_is_not_of_these_weights_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    saved(tmp_path, settings_of())
    edited(tmp_path, change)
    with pytest.raises(InputError, match=message):
        load_adapter(tiny_network(), tmp_path)


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, settings_of())
    (tmp_path / CONFIG_FILE).write_text("[1]")
    with pytest.raises(InputError, match="holds a list"):
        load_adapter(tiny_network(), tmp_path)
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_adapter(tiny_network(), tmp_path)


@pytest.mark.parametrize("method", ["lora", "dora", "full", "soft-prompt"])
@pytest.mark.parametrize("spoil", ["missing", "unknown", "shape", "infinite"])
def test_damaged_weights_of_every_method_are_refused_before_the_base_is_touched(
    tmp_path: Path, method: str, spoil: str
) -> None:
    settings = settings_of(method)
    network = trained(settings)
    weights = adapter_weights(network)
    name = max(weights)
    if spoil == "missing":
        del weights[name]
    elif spoil == "unknown":
        weights["model.layers.0.mlp.up_proj.weight"] = mx.zeros((64, 32))
    elif spoil == "shape":
        weights[name] = mx.zeros((3, 3))
    else:
        weights[name] = mx.full(weights[name].shape, math.inf)
    save_adapter(tmp_path, weights, config_of(tiny_network(), settings))
    base = tiny_network()
    before = logits(base)
    with pytest.raises(InputError, match=r"missing or unknown|expected|NaN or infinity"):
        load_adapter(base, tmp_path)
    assert np.allclose(logits(base), before, atol=1e-6)


def test_count_is_of_the_numbers_trained() -> None:
    # Layers of 4 + 3 matrices at rank 4: widths 32+32, 32+16 twice, 32+32, and 32+64 three times.
    assert count_parameters(adapter_weights(adapted(settings_of()))) == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 1e-6), (mx.bfloat16, 1e-2)])
def test_lora_is_computed_in_the_type_of_its_input_and_gives_what_mlx_lm_gives(
    dtype: mx.Dtype, tolerance: float
) -> None:
    from mlx_lm.tuner.lora import LoRALinear

    network = tiny_network(dtype=str(dtype).removeprefix("mlx.core."))
    add_adapter(network, adapter_config(TrainSettings(num_layers=1), 4), 0)
    layer = network.layers[3].mlp.down_proj
    layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    x = mx.random.normal((2, 5, 64), key=mx.random.key(2)).astype(dtype)
    ours, theirs = layer(x), LoRALinear.__call__(layer, x)
    assert layer.lora_a.dtype == mx.float32, "what is trained keeps its small changes"
    assert ours.dtype == theirs.dtype == dtype
    difference = mx.linalg.norm(ours.astype(mx.float32) - theirs.astype(mx.float32)).item()
    assert difference / mx.linalg.norm(theirs.astype(mx.float32)).item() < tolerance
    seen: list[mx.Dtype] = []
    plain = mx.array.__matmul__

    def watched(left: mx.array, right: mx.array) -> mx.array:
        seen.extend((left.dtype, right.dtype))
        return plain(left, right)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.array, "__matmul__", watched)
        layer(x)
    assert set(seen) == {dtype}
