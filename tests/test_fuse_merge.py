"""A fused model equals base and adapter, of every method that changes weights."""

from __future__ import annotations

import dataclasses
import shutil
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
from tasks.fuse.fidelity import PROOF_PROMPTS, PROOF_TOKENS, TEXTS
from tasks.fuse.merge import FUSION_FILE, fuse_adapter, merge_layers
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
    figures = fused.read_json(FUSION_FILE)
    assert figures["form"] == "dequantised"
    assert figures["fused"]["relative"] < 1e-5
    assert figures["fused"]["tokens"] == 0
    assert [len(answer) for answer in figures["adapter"]["tokens"]] == [PROOF_TOKENS] * PROOF_PROMPTS


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
        merge_layers(network)
        network.model.norm.weight *= -1

    monkeypatch.setattr(merge, "merge_layers", merge_wrongly)
    adapter = adapter_of(tmp_path / "adapter", tiny_model, "lora")
    for settings, fault in (
        (FuseSettings(tolerance=1e-5), r"test loss is \d.*, the adapter's \d.*over fuse\.tolerance = 1e-05"),
        (FuseSettings(tolerance=9, token_tolerance=0), r"of the adapter's greedy tokens otherwise"),
    ):
        with pytest.raises(StepError, match=rf"{fault}.*nothing was written"):
            fuse_adapter(settings, tiny_model, adapter, data)
    assert not list((runs_dir() / "steps" / "fuse").iterdir())


def test_without_rows_of_its_own_a_model_is_held_to_texts(tmp_path: Path, tiny_model: ModelFolder) -> None:
    adapter = adapter_of(tmp_path / "adapter", tiny_model, "lora")
    figures = fuse_adapter(FuseSettings(), tiny_model, adapter, None).read_json(FUSION_FILE)
    assert figures["rows"] == len(TEXTS)
    assert figures["fused"]["relative"] < 1e-5


def copied(model: ModelFolder, folder: Path) -> ModelFolder:
    shutil.copytree(model.path, folder)
    return dataclasses.replace(model, path=folder, fingerprint=str(folder))


def test_no_code_of_the_base_is_copied_and_nothing_that_was_true_of_it_alone(
    tmp_path: Path, tiny_model: ModelFolder
) -> None:
    base = copied(tiny_model, tmp_path / "base")
    (tmp_path / "elsewhere.py").write_text("print()")
    (base.path / "modeling_tiny.py").write_text("print()")
    (base.path / "more.py").symlink_to(tmp_path / "elsewhere.py")
    (base.path / "hf_quant_config.json").write_text("{}")
    adapter = adapter_of(tmp_path / "adapter", base, "lora")
    fused = fuse_adapter(FuseSettings(), base, adapter, None)
    assert {path.name for path in fused.path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "fusion.json",
        "inputs.json",
    }


def test_a_link_that_leads_out_of_the_base_is_not_followed(tmp_path: Path, tiny_model: ModelFolder) -> None:
    base = copied(tiny_model, tmp_path / "base")
    (tmp_path / "private.json").write_text('{"token": "secret"}')
    (base.path / "vocab.json").symlink_to(tmp_path / "private.json")
    adapter = adapter_of(tmp_path / "adapter", base, "lora")
    with pytest.raises(InputError, match=r"vocab\.json: is a link to .*private\.json, outside"):
        fuse_adapter(FuseSettings(), base, adapter, None)
    assert not list((runs_dir() / "steps" / "fuse").iterdir())


def test_the_links_of_the_hub_cache_are_its_own(tmp_path: Path, tiny_model: ModelFolder) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in tiny_model.path.iterdir():
        shutil.copyfile(path, blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    base = dataclasses.replace(tiny_model, path=snapshot)
    fused = fuse_adapter(FuseSettings(), base, adapter_of(tmp_path / "adapter", base, "lora"), None)
    copy = fused.path / "tokenizer.json"
    assert not copy.is_symlink()
    assert copy.read_bytes() == (tiny_model.path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "quantised"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_base_of_half_precision_stays_so(method: str, bits: int | None) -> None:
    network = tiny_network(bits=bits, dtype="bfloat16")
    settings = TrainSettings.model_validate({"method": method, "num_layers": 2, "rank": 4})
    add_adapter(network, adapter_config(settings, 4), 0)
    merge_layers(network)
    assert {array.dtype for _, array in tree_flatten(network.parameters())} == {mx.bfloat16}
    assert not any(hasattr(module, "bits") for module in network.modules())
