"""An adapter as PEFT reads it: its numbers, and a config by which PEFT finds these modules and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_networks
from conftest import TINY_LLAMA
from peft_folders import peft_tensors, write_peft_folder
from safetensors.numpy import load_file, save_file

from tasks.config import TrainSettings
from tasks.errors import InputError
from tasks.export.peft import _targets, write_peft
from tasks.models.folder import ModelFolder
from tasks.models.origin import Origin
from tasks.publish import write_json
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, save_adapter
from tasks.train.outline import outline
from tasks.train.peft_import import as_mlx_adapter
from tasks.train.targets import target_keys

ORIGIN = Origin("owner/tiny", {})


def base_of(folder: Path, kind: str) -> ModelFolder:
    """As much of a base as an export reads: its config."""
    folder.mkdir()
    config = tiny_networks.COMMON | tiny_networks.CONFIGS[kind] | {"model_type": kind}
    (folder / "config.json").write_text(json.dumps(config))
    return ModelFolder(folder, kind, kind, str(folder))


def exported(folder: Path, adapter: Path, model: ModelFolder) -> dict[str, Any]:
    folder.mkdir()
    write_peft(folder, adapter, model, ORIGIN)
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def saved(folder: Path, model: ModelFolder, **changes: object) -> Path:
    """An adapter as training writes it, of random numbers, with what it was trained with."""
    settings = TrainSettings.model_validate({"rank": 4, "num_layers": 2, **changes})
    network = outline(model.config())
    config = adapter_config(settings, 4, target_keys(network, settings.targets, settings.num_layers))
    add_adapter(network, config, 0)
    random = np.random.default_rng(1)
    shapes = {name: array.shape for name, array in adapter_weights(network).items()}
    folder.mkdir()
    weights = {name: mx.array(random.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}
    save_adapter(folder, weights, config)
    write_json(folder / "training.json", {"inputs": {"settings": settings.model_dump(mode="json")}})
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return dict(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_came_from_peft_goes_back_with_equal_bytes(
    tmp_path: Path, tiny_model: ModelFolder, dora: bool, dtype: type
) -> None:
    made = {name: array.astype(dtype) for name, array in peft_tensors(layers=[1, 2, 3], dora=dora).items()}
    theirs = write_peft_folder(
        tmp_path / "theirs", made, use_dora=dora, use_rslora=True, layers_to_transform=[1, 2, 3]
    )
    config = exported(tmp_path / "ours", as_mlx_adapter(theirs, tiny_model), tiny_model)
    back = tensors(tmp_path / "ours")
    assert back.keys() == made.keys()
    assert all(back[name].tobytes() == made[name].tobytes() for name in made)
    given = json.loads((theirs / "adapter_config.json").read_text())
    kept = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout", "layers_to_transform", "bias")
    assert {key: config[key] for key in kept} == {key: given[key] for key in kept}
    assert set(config["target_modules"]) == set(given["target_modules"])


def test_a_prompt_that_came_from_peft_goes_back_with_equal_bytes(
    tmp_path: Path, tiny_model: ModelFolder
) -> None:
    vectors = np.random.default_rng(2).normal(size=(5, 32)).astype(np.float32)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    given = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5}
    (theirs / "adapter_config.json").write_text(json.dumps(given))
    save_file({"prompt_embeddings": vectors}, theirs / "adapter_model.safetensors")
    config = exported(tmp_path / "ours", as_mlx_adapter(theirs, tiny_model), tiny_model)
    assert tensors(tmp_path / "ours")["prompt_embeddings"].tobytes() == vectors.tobytes()
    assert given.items() <= config.items()
    assert (config["token_dim"], config["num_layers"], config["num_attention_heads"]) == (32, 4, 4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"lora_alpha": 32, "use_rslora": False}),
        ({"rank_stabilized": True}, {"lora_alpha": 32, "use_rslora": True}),
        ({"scale": 20.0}, {"lora_alpha": 80, "use_rslora": False}),
        ({"scale": 20.0, "rank_stabilized": True}, {"lora_alpha": 80, "use_rslora": False}),
        ({"rank": 3, "scale": 0.1}, {"lora_alpha": pytest.approx(0.3), "use_rslora": False}),
        ({"num_layers": -1}, {"layers_to_transform": None, "layers_pattern": None}),
        ({}, {"layers_to_transform": [2, 3], "layers_pattern": "layers"}),
        ({"dropout": 0.1}, {"lora_dropout": 0.1, "use_dora": False}),
        ({"method": "dora"}, {"use_dora": True, "peft_type": "LORA"}),
        ({}, {"fan_in_fan_out": False, "bias": "none", "task_type": "CAUSAL_LM"}),
        ({}, {"base_model_name_or_path": "owner/tiny", "r": 4}),
    ],
)
def test_the_config_says_what_was_trained(
    tmp_path: Path, tiny_model: ModelFolder, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = exported(tmp_path / "out", saved(tmp_path / "a", tiny_model, **changes), tiny_model)
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gemma2"])
@pytest.mark.parametrize("targets", [["attention"], ["all-linear"], ["mlp"]])
@pytest.mark.parametrize("num_layers", [2, -1])
def test_peft_finds_the_modules_adapted_and_no_other(
    tmp_path: Path, kind: str, targets: list[str], num_layers: int
) -> None:
    model = base_of(tmp_path / "base", kind)
    adapter = saved(tmp_path / "a", model, targets=targets, num_layers=num_layers)
    config = exported(tmp_path / "out", adapter, model)
    names = {name.removeprefix("base_model.model.") for name in tensors(tmp_path / "out")}
    adapted = {name.rpartition(".lora_")[0] for name in names}
    assert found_by_peft(config, [path for path, _ in outline(model.config()).named_modules()]) == adapted


def test_a_name_that_other_modules_have_too_is_given_with_its_path(tmp_path: Path) -> None:
    """PEFT looks at the ends of paths only."""
    network = outline(TINY_LLAMA)
    for layer in network.layers:
        layer.mlp.q_proj = layer.mlp.up_proj
    wanted = {f"model.layers.{index}.self_attn.q_proj" for index in range(4)}
    assert _targets(wanted, network, 0) == ["self_attn.q_proj"]
    some = {f"model.layers.{index}.self_attn.k_proj" for index in (1, 3)}
    assert _targets(some, network, 0) == ["1.self_attn.k_proj", "3.self_attn.k_proj"]


def found_by_peft(config: dict[str, Any], paths: list[str]) -> set[str]:
    """PEFT 0.21's rule (`check_target_module_exists`) in a few words."""
    found = set()
    for path in paths:
        if not any(path == name or path.endswith(f".{name}") for name in config["target_modules"]):
            continue
        layers = config["layers_to_transform"]
        if layers is None or int(path.split(f"{config['layers_pattern']}.")[1].split(".")[0]) in layers:
            found.add(path)
    return found


def test_full_training_is_refused_with_the_way(tmp_path: Path, tiny_model: ModelFolder) -> None:
    adapter = saved(tmp_path / "a", tiny_model, method="full")
    with pytest.raises(InputError, match=r"full training .* --to hf"):
        exported(tmp_path / "out", adapter, tiny_model)


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("qwen3_moe", ["all-linear"], "'qwen3_moe': its experts are stacked"),
        ("mamba", ["all-linear"], "'mamba': its modules may have other names"),
    ],
)
def test_a_base_of_other_names_is_refused(
    tmp_path: Path, kind: str, targets: list[str], message: str
) -> None:
    model = base_of(tmp_path / "base", kind)
    adapter = saved(tmp_path / "a", model, targets=targets)
    with pytest.raises(InputError, match=message):
        exported(tmp_path / "out", adapter, model)


def test_a_soft_prompt_of_scaled_embeddings_is_refused(tmp_path: Path) -> None:
    model = base_of(tmp_path / "base", "gemma2")
    adapter = saved(tmp_path / "a", model, method="soft-prompt")
    with pytest.raises(InputError, match="'gemma2': its embeddings may be scaled"):
        exported(tmp_path / "out", adapter, model)


def test_an_adapter_that_is_not_sound_is_not_exported(tmp_path: Path, tiny_model: ModelFolder) -> None:
    adapter = saved(tmp_path / "a", tiny_model)
    weights = adapter / "adapters.safetensors"
    broken = dict(load_file(weights))
    del broken[min(broken)]
    save_file(broken, weights)
    with pytest.raises(InputError, match="1 tensors missing or unknown"):
        exported(tmp_path / "out", adapter, tiny_model)
