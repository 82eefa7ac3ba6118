"""The hub's layout holds what a model consists of, and nothing that is ours or of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tasks.export.hf_folder import is_quantised, write_hf_folder
from tasks.models.folder import ModelFolder


@pytest.fixture
def fused(tmp_path: Path, tiny_model: ModelFolder) -> Path:
    """A model folder with more beside it than a model."""
    folder = tmp_path / "fused"
    shutil.copytree(tiny_model.path, folder)
    for name in ("inputs.json", "fusion.json", "modeling.py", "training.json"):
        (folder / name).write_text("{}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/me/model"}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"name_or_path": "owner/model"}))
    return folder


def test_only_the_models_own_files_are_there(tmp_path: Path, fused: Path, tiny_model: ModelFolder) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_hf_folder(out, fused)
    ours = {path.name for path in tiny_model.path.iterdir()}
    assert {path.name for path in out.iterdir()} == ours | {"generation_config.json"}
    assert (out / "model.safetensors").read_bytes() == (fused / "model.safetensors").read_bytes()
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


def test_a_place_is_taken_out_of_the_configs_and_a_name_of_the_hub_stays(tmp_path: Path, fused: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_hf_folder(out, fused)
    assert "_name_or_path" not in json.loads((out / "config.json").read_text())
    assert json.loads((out / "tokenizer_config.json").read_text())["name_or_path"] == "owner/model"


def test_a_generation_config_that_is_there_stays(tmp_path: Path, fused: Path) -> None:
    (fused / "generation_config.json").write_text('{"temperature": 0.3}')
    out = tmp_path / "out"
    out.mkdir()
    write_hf_folder(out, fused)
    assert (out / "generation_config.json").read_text() == '{"temperature": 0.3}'


def test_mlx_quantisation_is_told_apart(fused: Path) -> None:
    assert not is_quantised(fused)
    config = json.loads((fused / "config.json").read_text())
    (fused / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 4}}))
    assert is_quantised(fused)
