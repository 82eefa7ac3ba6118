"""A fused model equals base and adapter, of every method that changes weights."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import tiny_network
from mlx.utils import tree_flatten

from tasks.config import FuseSettings, TrainSettings
from tasks.errors import InputError, StepError
from tasks.fuse import merge
from tasks.fuse.merge import FUSION_FILE, _merge, fuse_adapter
from tasks.home import runs_dir
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.prepare.splits import TokenRows, save_splits
from tasks.publish import StepOutput
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, load_adapter, save_adapter

TOKENS = mx.array([[5, 6, 7, 8, 9]])


@pytest.fixture
def data(tmp_path: Path, token_rows: TokenRows) -> StepOutput:
    folder = tmp_path / "data"
    folder.mkdir()
    save_splits(folder, dict.fromkeys(("train", "valid", "test"), token_rows))
    return StepOutput(folder, "data", False, 0.0)


def adapter_of(folder: Path, model: ModelFolder, method: str) -> StepOutput:
    settings = TrainSettings.model_validate({"method": method, "num_layers": -1, "rank": 4})
    network = load_model(model.path).model
    add_adapter(network, adapter_config(settings, 4), 0)
    weights = {name: array + 0.03 for name, array in adapter_weights(network).items()}
    folder.mkdir()
    save_adapter(folder, weights, adapter_config(settings, 4))
    return StepOutput(folder, method, False, 0.0)


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_the_fused_model_alone_gives_the_logits_of_base_and_adapter(
    tmp_path: Path, tiny_model: ModelFolder, data: StepOutput, method: str
) -> None:
    adapter = adapter_of(tmp_path / "adapter", tiny_model, method)
    fused = fuse_adapter(FuseSettings(), tiny_model, adapter, data)
    network = load_model(tiny_model.path).model
    plain = np.array(network(TOKENS))
    load_adapter(network, adapter.path)
    expected = np.array(network(TOKENS))
    assert not np.allclose(plain, expected, atol=1e-3)
    assert np.allclose(np.array(load_model(fused.path).model(TOKENS)), expected, atol=1e-4)
    assert fused.read_json(FUSION_FILE)["relative_difference"] < 1e-5


def test_a_soft_prompt_is_refused_with_the_reason(
    tmp_path: Path, tiny_model: ModelFolder, data: StepOutput
) -> None:
    adapter = adapter_of(tmp_path / "adapter", tiny_model, "soft-prompt")
    with pytest.raises(InputError, match=r"part of the input.*set fuse\.enabled=false"):
        fuse_adapter(FuseSettings(), tiny_model, adapter, data)


def test_a_merge_that_changes_the_model_is_not_published(
    tmp_path: Path, tiny_model: ModelFolder, data: StepOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge_wrongly(network: nn.Module) -> None:
        _merge(network)
        network.layers[0].mlp.up_proj.weight *= 1.5

    monkeypatch.setattr(merge, "_merge", merge_wrongly)
    adapter = adapter_of(tmp_path / "adapter", tiny_model, "lora")
    with pytest.raises(StepError, match="nothing was written"):
        fuse_adapter(FuseSettings(tolerance=1e-5), tiny_model, adapter, data)
    assert not list((runs_dir() / "steps" / "fuse").iterdir())


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "quantised"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_base_of_half_precision_stays_so(method: str, bits: int | None) -> None:
    network = tiny_network(bits=bits, dtype="bfloat16")
    settings = TrainSettings.model_validate({"method": method, "num_layers": 2, "rank": 4})
    add_adapter(network, adapter_config(settings, 4), 0)
    _merge(network)
    assert {array.dtype for _, array in tree_flatten(network.parameters())} == {mx.bfloat16}
    assert not any(hasattr(module, "bits") for module in network.modules())
