"""A fused model is quantised when that keeps what the adapter changed, and else not, which is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TINY_LLAMA, save_tiny_tokenizer, tiny_network
from mlx.optimizers import Adam
from mlx_lm.utils import load_model as mlx_lm_load_model
from mlx_lm.utils import save_model

from tasks.config import FuseSettings, TrainSettings
from tasks.fuse.fidelity import observe, proof_rows
from tasks.fuse.merge import FUSION_FILE, fuse_adapter
from tasks.fuse.quantised_form import base_quantisation
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.publish import StepOutput
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, load_adapter, save_adapter
from tasks.train.batches import sorted_batches
from tasks.train.loss import batch_loss

TOKENS = mx.array([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A tiny Llama, its attention of 4 bits, its MLP of 8, in bfloat16, its embedding as it was."""
    folder = tmp_path_factory.mktemp("base")
    network = tiny_network(dtype="bfloat16")

    def chosen(path: str, module: nn.Module) -> bool | dict[str, object]:
        if "mlp" in path:
            return {"group_size": 32, "bits": 8, "mode": "affine"}
        return "self_attn" in path and hasattr(module, "to_quantized")

    nn.quantize(network, group_size=32, bits=4, class_predicate=chosen)
    save_model(folder, network)
    usual: dict[str, object] = {"group_size": 32, "bits": 4, "mode": "affine"}
    layers = {path: chosen(path, module) for path, module in network.named_modules() if "mlp." in path}
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA | {"quantization": usual | layers}))
    save_tiny_tokenizer(folder)
    return ModelFolder(folder, "tiny-mixed", "tiny-mixed", str(folder))


def trained(folder: Path, model: ModelFolder, steps: int, learning_rate: float) -> StepOutput:
    """An adapter that has learnt the texts of the proof, much or little."""
    settings = TrainSettings(num_layers=-1, rank=4)
    network = load_model(model.path).model
    add_adapter(network, adapter_config(settings, 4), 0)
    optimizer = Adam(learning_rate)
    step = nn.value_and_grad(network, batch_loss)
    for _ in range(steps):
        for batch in sorted_batches(proof_rows(None, model.path), 8):
            optimizer.update(network, step(network, batch)[1])
            mx.eval(network.parameters())
    folder.mkdir()
    save_adapter(folder, adapter_weights(network), adapter_config(settings, 4))
    return StepOutput(folder, str(folder), False, 0.0)


def adapted_logits(model: ModelFolder, adapter: StepOutput) -> np.ndarray:
    network = load_model(model.path).model
    load_adapter(network, adapter.path)
    return np.array(network(TOKENS))


def test_an_adapter_that_survives_is_quantised_as_its_base_was_layer_by_layer(
    tmp_path: Path, base: ModelFolder
) -> None:
    adapter = trained(tmp_path / "adapter", base, steps=3, learning_rate=5e-3)
    fused = fuse_adapter(FuseSettings(quantize="base"), base, adapter, None)
    assert fused.read_json(FUSION_FILE)["form"] == "quantised"
    assert base_quantisation(fused.path) == base_quantisation(base.path)
    network, _ = mlx_lm_load_model(fused.path)
    assert network.layers[0].self_attn.q_proj.bits == 4
    assert network.layers[0].mlp.up_proj.bits == 8
    assert network.layers[0].self_attn.q_proj.scales.dtype == mx.bfloat16
    assert not hasattr(network.model.embed_tokens, "bits")
    figures = fused.read_json(FUSION_FILE)
    found = observe(load_model(fused.path).model, proof_rows(None, base.path)).loss
    assert found == pytest.approx(figures["quantised"]["loss"])
    assert figures["quantised"]["loss"] < (figures["adapter"]["loss"] + figures["base"]["loss"]) / 2


def test_where_quantising_again_loses_the_adapter_it_stays_dequantised_and_both_figures_are_said(
    tmp_path: Path, base: ModelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = trained(tmp_path / "adapter", base, steps=1, learning_rate=5e-5)
    with caplog.at_level(logging.WARNING):
        fused = fuse_adapter(FuseSettings(quantize="base", tolerance=1e-5), base, adapter, None)
    figures = fused.read_json(FUSION_FILE)
    assert figures["form"] == "dequantised"
    lost = figures["quantised"]["loss"] - figures["adapter"]["loss"]
    assert lost > (figures["base"]["loss"] - figures["adapter"]["loss"]) / 2 > 0
    for which in ("quantised", "adapter", "base"):
        assert f"{figures[which]['loss']:.5f}" in caplog.text
    assert "the dequantised form is kept" in caplog.text
    assert base_quantisation(fused.path) is None
    assert np.allclose(
        np.array(load_model(fused.path).model(TOKENS)), adapted_logits(base, adapter), atol=1e-4
    )
    assert not list(fused.path.glob("quantised*"))


def test_greedy_tokens_alone_can_keep_a_model_from_being_quantised(
    tmp_path: Path, base: ModelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = trained(tmp_path / "adapter", base, steps=3, learning_rate=5e-3)
    bounds = {"tolerance": 10.0, "token_tolerance": 0.0, "keep": 1.0}  # any loss, and no token
    settings = FuseSettings.model_validate({"quantize": {"bits": 2, "group_size": 32}, **bounds})
    fused = fuse_adapter(settings, base, adapter, None)
    figures = fused.read_json(FUSION_FILE)
    assert figures["form"] == "dequantised"
    assert figures["quantised"]["tokens"] > 0
    told = f"{figures['quantised']['tokens']:.1%} of the adapter's greedy tokens otherwise"
    assert told in caplog.text


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_is_quantised_to_the_bits_asked_for(
    tmp_path: Path, tiny_model: ModelFolder, bits: int
) -> None:
    adapter = trained(tmp_path / "adapter", tiny_model, steps=3, learning_rate=5e-3)
    settings = FuseSettings.model_validate({"quantize": {"bits": bits, "group_size": 32}})
    fused = fuse_adapter(settings, tiny_model, adapter, None)
    network, config = mlx_lm_load_model(fused.path)
    assert config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}
    assert network.layers[0].self_attn.q_proj.bits == bits


def test_a_base_that_is_not_quantised_needs_nothing_to_be_as_it_was(
    tmp_path: Path, tiny_model: ModelFolder
) -> None:
    adapter = trained(tmp_path / "adapter", tiny_model, steps=1, learning_rate=2e-3)
    fused = fuse_adapter(FuseSettings(quantize="base"), tiny_model, adapter, None)
    assert fused.read_json(FUSION_FILE)["form"] == "dequantised"


def test_a_group_size_that_fits_no_matrix_leaves_the_fused_model_whole(
    tmp_path: Path, tiny_model: ModelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = trained(tmp_path / "adapter", tiny_model, steps=1, learning_rate=2e-3)
    settings = FuseSettings.model_validate({"quantize": {"bits": 4, "group_size": 128}})
    fused = fuse_adapter(settings, tiny_model, adapter, None)
    assert "multiple of fuse.quantize.group_size = 128" in caplog.text
    assert base_quantisation(fused.path) is None
    assert load_model(fused.path)
