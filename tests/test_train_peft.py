"""An adapter of PEFT's becomes one of mlx-lm's that computes the same; what cannot is refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_networks
from conftest import TINY_LLAMA, tiny_network
from mlx.utils import tree_flatten
from peft_folders import peft_tensors, write_peft_folder
from safetensors.numpy import save_file

from tasks.errors import InputError
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.train.adapters import adapter_weights, load_adapter, save_adapter
from tasks.train.peft_config import is_peft, read_peft_config
from tasks.train.peft_import import ORIGIN_FILE, Converted, as_mlx_adapter, from_peft
from tasks.train.peft_layout import check_family

TOKENS = mx.array([[5, 6, 7, 8, 9, 10]])


def converted(folder: Path, base: dict[str, Any] | None = None) -> Converted:
    return from_peft(read_peft_config(folder), base or TINY_LLAMA)


def merged_by_hand(tensors: dict[str, np.ndarray], scales: dict[str, float]) -> np.ndarray:
    """Logits of the tiny network with every W + scale · B A, or DoRA's, written into its weights.

    PEFT's own formulas (0.21, tuners/lora): `get_delta_weight`, and for DoRA `DoraLinearLayer`.
    """
    network = tiny_network()
    stems = {name.rpartition(".lora_")[0] for name in tensors}
    for stem in stems:
        path = stem.removeprefix("base_model.model.")
        module = dict(network.named_modules())[path]
        a, b = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
        weight = np.array(module.weight) + scales[path] * (b @ a)
        if (magnitude := tensors.get(f"{stem}.lora_magnitude_vector")) is not None:
            weight *= (magnitude / np.linalg.norm(weight, axis=1))[:, None]
        module.weight = mx.array(weight)
    return np.array(network(TOKENS))


def logits_of(folder: Path, result: Converted) -> np.ndarray:
    folder.mkdir()
    save_adapter(folder, result.weights, result.config)
    network = tiny_network()
    load_adapter(network, folder)
    return np.array(network(TOKENS))


def paths_of(tensors: dict[str, np.ndarray]) -> set[str]:
    return {name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in tensors}


@pytest.mark.parametrize(
    ("made", "config", "scale", "layers"),
    [
        ({}, {}, 2.0, 4),
        ({"layers": [2, 3]}, {"layers_to_transform": [2, 3], "layers_pattern": "layers"}, 2.0, 2),
        ({}, {"use_rslora": True}, 4.0, 4),
        ({"dora": True}, {"use_dora": True}, 2.0, 4),
        ({"rank": 3}, {"r": 3, "lora_alpha": 10}, 10 / 3, 4),
        ({}, {"rank_pattern": {"q_proj": 4, "down_proj": 4}, "r": 64}, 2.0, 4),
    ],
    ids=["lora", "last-layers", "stabilised", "dora", "rank-3", "one-rank-by-pattern"],
)
def test_it_computes_what_peft_does(
    tmp_path: Path, made: dict[str, Any], config: dict[str, Any], scale: float, layers: int
) -> None:
    tensors = peft_tensors(**made)
    result = converted(write_peft_folder(tmp_path / "peft", tensors, **config))
    parameters = result.config["lora_parameters"]
    assert result.config["fine_tune_type"] == ("dora" if made.get("dora") else "lora")
    assert result.config["num_layers"] == layers
    assert parameters["keys"] == ["mlp.down_proj", "self_attn.q_proj"]
    assert parameters["dropout"] == 0.05
    assert result.changes == []
    if "rank_pattern" not in config:
        assert parameters["scale"] == pytest.approx(scale, rel=1e-15)
    expected = merged_by_hand(tensors, dict.fromkeys(paths_of(tensors), parameters["scale"]))
    assert not np.allclose(np.array(tiny_network()(TOKENS)), expected, atol=1e-2)
    assert np.allclose(logits_of(tmp_path / "mlx", result), expected, atol=1e-4)


def test_modules_of_several_ranks_and_scales_are_filled_up_and_compute_the_same(tmp_path: Path) -> None:
    small = peft_tensors(["mlp.down_proj"], rank=2)
    tensors = peft_tensors(["self_attn.q_proj"]) | small
    folder = write_peft_folder(
        tmp_path / "peft",
        tensors,
        rank_pattern={"down_proj": 2},
        alpha_pattern={"model.layers.1.mlp.down_proj": 6, "^model.layers.2.mlp.down_proj": 4},
    )
    result = converted(folder)
    # alpha 8 with rank 4 is 2, with rank 2 is 4; of layers 1 and 2 it is 6 / 2 and 4 / 2.
    scales = {path: 2.0 if path.endswith("q_proj") else 4.0 for path in paths_of(tensors)}
    scales |= {"model.layers.1.mlp.down_proj": 3.0, "model.layers.2.mlp.down_proj": 2.0}
    assert result.config["lora_parameters"] | {"rank": 4, "scale": 2.0} == result.config["lora_parameters"]
    assert np.allclose(logits_of(tmp_path / "mlx", result), merged_by_hand(tensors, scales), atol=1e-4)
    assert result.changes == [
        "of 8 modules 4 are of a smaller rank, filled up to 4 with zeros",
        "of 8 modules 3 have another scale than 2, put into their B",
    ]


def test_layers_left_out_are_zeros_that_training_leaves_alone(tmp_path: Path) -> None:
    tensors = peft_tensors(layers=[1, 3])
    result = converted(write_peft_folder(tmp_path / "peft", tensors, layers_to_transform=[1, 3]))
    assert result.config["num_layers"] == 3
    assert result.changes == ["2 modules that it leaves out are there as zeros"]
    expected = merged_by_hand(tensors, dict.fromkeys(paths_of(tensors), 2.0))
    assert np.allclose(logits_of(tmp_path / "mlx", result), expected, atol=1e-4)

    network = tiny_network()
    load_adapter(network, tmp_path / "mlx")
    _, gradient = nn.value_and_grad(network, lambda: network(TOKENS).square().mean())()
    flat = dict(tree_flatten(gradient))
    silent = {name for name, array in flat.items() if not np.array(array).any()}
    assert silent == {name for name in flat if ".layers.2." in name}


def test_dora_that_leaves_out_layers_is_refused(tmp_path: Path) -> None:
    folder = write_peft_folder(tmp_path, peft_tensors(layers=[1, 3], dora=True), use_dora=True)
    with pytest.raises(InputError, match=r"leaves out model\.layers\.2\.mlp\.down_proj"):
        converted(folder)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_numbers_and_their_type_stay_as_they_are(tmp_path: Path, dtype: type) -> None:
    tensors = {name: array.astype(dtype) for name, array in peft_tensors().items()}
    result = converted(write_peft_folder(tmp_path, tensors))
    for name, array in tensors.items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        ours = np.array(result.weights[f"{module}.lora_{part[0].lower()}"])
        assert ours.dtype == dtype
        assert np.array_equal(ours.T, array)


def test_a_soft_prompt_is_the_same_vectors(tmp_path: Path) -> None:
    vectors = np.random.default_rng(2).normal(size=(5, 32)).astype(np.float32)
    settings = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "num_transformer_submodules": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"prompt_embeddings": vectors}, tmp_path / "adapter_model.safetensors")
    result = converted(tmp_path)
    assert result.config == {"fine_tune_type": "soft-prompt", "prompt_tokens": 5}
    [prompt] = result.weights.values()
    assert np.array_equal(np.array(prompt), vectors)
    with pytest.raises(InputError, match="'gemma2': its embeddings may be scaled"):
        converted(tmp_path, TINY_LLAMA | {"model_type": "gemma2"} | GEMMA)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"num_virtual_tokens": 6}))
    with pytest.raises(InputError, match=r"\(5, 32\), adapter_config.json says 6 tokens"):
        converted(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"num_transformer_submodules": 2}))
    with pytest.raises(InputError, match="num_transformer_submodules = 2"):
        converted(tmp_path)


GEMMA = {
    "head_dim": 8,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 8,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bias": "all"}, r'bias = "all": biases of the base are trained with it.*merge_and_unload'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .*whole modules are kept"),
        ({"trainable_token_indices": [3]}, "rows of the embedding"),
        ({"target_parameters": ["a"]}, "no linear modules"),
        ({"layer_replication": [[0, 4]]}, "layers of the base are repeated"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"use_qalora": True}, "pooled"),
        ({"lora_bias": True}, "its B has a bias"),
        ({"some_new_idea": {"on": 1}}, "some_new_idea = .*not known what that changes"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa': .* a base that this changed"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"rank_pattern": {"(a+)+b": 4}}, "an expression; name the modules"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern holds a list"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern of q_proj = -1"),
        ({"r": 8}, r"\(4, 64\) and \(32, 4\), adapter_config.json says rank 8"),
        ({"r": True}, "r = True; expected a number"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"lora_dropout": 1.5}, "lora_dropout = 1.5"),
        ({"target_modules": ["q_proj"]}, "down_proj is none of target_modules"),
        ({"use_dora": True}, r"of model\.layers\.0\.mlp\.down_proj m is missing"),
    ],
)
def test_what_mlx_lm_has_no_layer_for_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = write_peft_folder(tmp_path, **config)
    with pytest.raises(InputError, match=message):
        converted(folder)


def test_a_key_not_known_but_off_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_peft_folder(tmp_path, some_new_idea=None)
    with caplog.at_level(logging.WARNING):
        read_peft_config(folder)
    assert "some_new_idea is not known here" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(min(t)), "of model.layers.0.mlp.down_proj lora_a is missing"),
        (lambda t: t.update({"base_model.model.lm_head.weight": t[min(t)]}), "lm_head.weight is no matrix"),
        (lambda t: t.update(peft_tensors(layers=[9])), "no linear module model.layers.9.mlp.down_proj"),
        (lambda t: t.update({min(t): np.full((4, 64), np.nan, np.float32)}), "NaN or infinity"),
        (lambda t: t.update({min(t): np.zeros((4, 64))}), "is of type F64; expected one of F32"),
        (
            lambda t: t.update({min(t): np.zeros((4, 63), np.float32)}),
            r"is \(63, 4\), the base takes \(64, 4\)",
        ),
        (lambda t: t.clear(), "holds no tensors"),
    ],
    ids=["missing", "base-weights", "layer", "nan", "type", "width", "empty"],
)
def test_tensors_that_are_not_those_of_the_config_are_refused(
    tmp_path: Path, change: Any, message: str
) -> None:
    tensors = peft_tensors()
    change(tensors)
    with pytest.raises(InputError, match=message):
        converted(write_peft_folder(tmp_path, tensors))


def test_a_pickle_is_never_read_and_a_spoilt_file_neither(tmp_path: Path) -> None:
    folder = write_peft_folder(tmp_path)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"more")
    with pytest.raises(InputError, match="tensors end at byte"):
        converted(folder)
    weights.rename(folder / "adapter_model.bin")
    assert is_peft(folder)
    with pytest.raises(InputError, match="is a pickle, which can run any code"):
        read_peft_config(folder)


def test_a_base_of_other_names_is_refused(tmp_path: Path) -> None:
    base = tiny_networks.COMMON | tiny_networks.CONFIGS["mamba"] | {"model_type": "mamba"}
    with pytest.raises(InputError, match="'mamba': its modules may have other names"):
        converted(write_peft_folder(tmp_path), base)


def test_dora_is_refused_on_a_base_whose_bits_mlx_lm_cannot_load(tmp_path: Path) -> None:
    folder = write_peft_folder(tmp_path, peft_tensors(dora=True), use_dora=True)
    with pytest.raises(InputError, match="base of 6 bits"):
        converted(folder, TINY_LLAMA | {"quantization": {"bits": 6, "group_size": 32}})


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(tmp_path: Path, missing: str) -> None:
    folder = write_peft_folder(tmp_path)
    (folder / missing).unlink()
    assert is_peft(folder)
    with pytest.raises(InputError, match=f"has no {missing}"):
        read_peft_config(folder)


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[1]", "holds a list")])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    folder = write_peft_folder(tmp_path)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_peft_config(folder)


def test_of_experts_only_the_attention_passes() -> None:
    check_family("qwen3_moe", ["model.layers.0.self_attn.q_proj"])
    with pytest.raises(InputError, match="experts are stacked"):
        check_family("qwen3_moe", ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate"])


def test_it_is_converted_once_for_each_base_and_keeps_what_it_was(
    tmp_path: Path, tiny_model: ModelFolder
) -> None:
    folder = write_peft_folder(tmp_path / "theirs")
    made = as_mlx_adapter(folder, tiny_model)
    assert as_mlx_adapter(folder, tiny_model) == made
    assert as_mlx_adapter(made, tiny_model) == made, "one of mlx-lm's is taken as it is"
    assert json.loads((made / ORIGIN_FILE).read_text())["config"]["peft_version"] == "0.21.2"
    network = load_model(tiny_model.path).model
    load_adapter(network, made)
    assert len(adapter_weights(network)) == 16
    write_peft_folder(folder, lora_alpha=16)
    assert as_mlx_adapter(folder, tiny_model) != made
