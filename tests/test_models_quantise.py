"""A base quantised at import: a model folder of its own that mlx-lm and every later step take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_models_gguf import Q4_0, write_tiny_gguf

from tasks.config import ModelSettings
from tasks.errors import InputError
from tasks.home import cache_dir
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.models.resolve import resolve_model

TOKENS = mx.array([[5, 6, 7, 8]])


def quantised(source: object, **quantize: int) -> ModelFolder:
    return resolve_model(
        ModelSettings.model_validate({"source": str(source), "quantize": {"group_size": 32, **quantize}})
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_mlx_lm_takes_the_folder_and_every_later_step_computes_with_its_weights(
    tiny_model: ModelFolder, bits: int
) -> None:
    from mlx_lm import load

    folder = quantised(tiny_model.path, bits=bits)
    theirs, _ = load(str(folder.path))
    expected, _ = load(str(tiny_model.path))
    nn.quantize(expected, group_size=32, bits=bits)
    assert theirs.layers[0].self_attn.q_proj.bits == bits
    assert np.array_equal(np.array(theirs(TOKENS)), np.array(expected(TOKENS)))
    # On CPU our form of it is dequantised: the same but for rounding.
    ours = load_model(folder.path)
    assert np.allclose(np.array(ours.model(TOKENS)), np.array(expected(TOKENS)), atol=1e-4)
    assert ours.tokenizer.encode("abc") == load_model(tiny_model.path).tokenizer.encode("abc")


def test_it_lies_beside_imported_models_under_a_fingerprint_of_its_own_and_is_made_once(
    tiny_model: ModelFolder,
) -> None:
    plain = resolve_model(ModelSettings(source=str(tiny_model.path)))
    folder = quantised(tiny_model.path, bits=4)
    assert folder.path.parent == cache_dir() / "models"
    assert folder.name == f"{plain.name}-4bit"
    assert folder.path.name.startswith(folder.name)
    made = folder.path.stat().st_mtime_ns
    again = quantised(tiny_model.path, bits=4)
    assert (again, again.path.stat().st_mtime_ns) == (folder, made)
    others = [plain, quantised(tiny_model.path, bits=8), quantised(tiny_model.path, bits=4, group_size=64)]
    assert len({folder.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert json.loads((folder.path / "config.json").read_text())["quantization"]["bits"] == 4


def test_a_gguf_file_is_quantised_from_what_it_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own quantised form, which a GPU would keep, stays out of it: a Mac and a CPU have the same base."""
    monkeypatch.setattr("tasks.models.gguf_import.on_gpu", lambda: True)
    write_tiny_gguf(tmp_path / "tiny.gguf", kind=Q4_0)
    folder = quantised(tmp_path / "tiny.gguf", bits=8)
    assert json.loads((folder.path / "config.json").read_text())["quantization"]["bits"] == 8
    assert folder.name == "tiny-8bit"


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_a_quantised_base_is_not_quantised_again(tiny_model: ModelFolder, key: str) -> None:
    """Model folders have either key, or as mlx-lm writes it both."""
    folder = quantised(tiny_model.path, bits=4)
    config = json.loads((folder.path / "config.json").read_text())
    del config[key]
    (folder.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"quantised already; leave model\.quantize out"):
        quantised(folder.path, bits=8)


def test_a_group_size_that_fits_no_matrix_is_refused_and_leaves_nothing(tiny_model: ModelFolder) -> None:
    with pytest.raises(InputError, match=r"group_size = 128: no matrix"):
        quantised(tiny_model.path, bits=4, group_size=128)
    assert not list((cache_dir() / "models").iterdir())


def test_damaged_weights_are_refused_before_they_are_read(tiny_model: ModelFolder, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_model.path, source)
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"tail")
    with pytest.raises(InputError, match=r"model\.safetensors: tensors end at byte"):
        quantised(source, bits=4)


def test_code_beside_the_weights_is_not_copied(tiny_model: ModelFolder, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_model.path, source)
    (tmp_path / "secret").write_text("print()")
    (source / "secret.py").symlink_to(tmp_path / "secret")
    folder = quantised(source, bits=4)
    assert not list(folder.path.glob("*.py"))
    assert (folder.path / "tokenizer.json").is_file()


def test_lora_trains_on_the_quantised_base(tiny_model: ModelFolder) -> None:
    from mlx_lm import load

    from tasks.config import TrainSettings
    from tasks.train.adapters import adapter_config, adapter_weights, add_adapter

    network, _ = load(str(quantised(tiny_model.path, bits=4).path))
    add_adapter(network, adapter_config(TrainSettings(num_layers=2, rank=4), 4), 0)
    gradient = nn.value_and_grad(network, lambda: mx.square(network(TOKENS)).mean())()[1]
    moving = {name for name, array in tree_flatten(gradient) if float(mx.abs(array).max()) > 0}
    assert moving == {name for name in adapter_weights(network) if name.endswith("lora_b")}
