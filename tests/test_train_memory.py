"""The rough memory estimate counts what it can count exactly and grows with what costs memory."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, save_model

from tasks.config import TrainSettings
from tasks.models.device import on_gpu
from tasks.models.folder import ModelFolder
from tasks.prepare.splits import TokenRows, save_splits
from tasks.publish import StepOutput
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, count_parameters
from tasks.train.memory import MemoryEstimate, estimate_memory, weights_bytes


@pytest.fixture
def data(tmp_path: Path, token_rows: TokenRows) -> StepOutput:
    save_splits(tmp_path, dict.fromkeys(("train", "valid", "test"), token_rows))
    return StepOutput(tmp_path, "data", False, 0.0)


def estimate(model: ModelFolder, data: StepOutput, **changes: object) -> MemoryEstimate:
    settings = {"num_layers": 2, "rank": 4, "batch_size": 2, **changes}
    return estimate_memory(TrainSettings.model_validate(settings), model, data)


def test_adapters_are_counted_exactly_with_gradient_and_two_moments(
    tiny_model: ModelFolder, data: StepOutput
) -> None:
    network, _ = load_model(tiny_model.path)
    add_adapter(network, adapter_config(TrainSettings(num_layers=2, rank=4), 4), seed=0)
    parameters = count_parameters(adapter_weights(network))
    assert estimate(tiny_model, data).adapters == 4 * 4 * parameters


@pytest.mark.skipif(on_gpu(), reason="on a GPU weights stay as stored")
def test_on_cpu_a_quantised_base_counts_as_the_float32_it_becomes(
    tiny_model: ModelFolder, tmp_path: Path
) -> None:
    network, config = load_model(tiny_model.path)
    plain_bytes = sum(array.nbytes for _, array in tree_flatten(network.parameters()))
    assert weights_bytes(tiny_model.path, config) == plain_bytes
    network.set_dtype(mx.bfloat16)
    nn.quantize(network, group_size=32, bits=4)
    save_model(tmp_path / "quantised", network)
    quantised = json.loads(json.dumps(config)) | {"quantization": {"group_size": 32, "bits": 4}}
    assert weights_bytes(tmp_path / "quantised", quantised) == plain_bytes


@pytest.mark.parametrize("larger", [{"num_layers": -1}, {"rank": 64}, {"batch_size": 8}])
def test_more_layers_rank_and_rows_cost_more(
    tiny_model: ModelFolder, data: StepOutput, larger: dict[str, object]
) -> None:
    assert estimate(tiny_model, data, **larger).peak_bytes > estimate(tiny_model, data).peak_bytes
