"""A model folder loads in float32 on CPU and touches nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_models_gguf import Q4_0, write_tiny_gguf

from tasks.errors import InputError
from tasks.models.device import device_name, on_gpu
from tasks.models.gguf_import import import_gguf
from tasks.models.load import load_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_gguf(tmp_path / "tiny.gguf", kind=Q4_0)
    return import_gguf(tmp_path / "tiny.gguf", "tiny", "stored")


@pytest.mark.skipif(on_gpu(), reason="on a GPU weights stay as stored")
def test_on_cpu_a_quantised_model_becomes_float32(folder: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    assert "quantization" in json.loads((folder / "config.json").read_text())
    loaded = load_model(folder)
    assert {value.dtype for _, value in tree_flatten(loaded.model.parameters())} == {mx.float32}
    assert "quantization" not in loaded.config
    assert not any(hasattr(module, "bits") for _, module in loaded.model.named_modules())
    assert not loaded.model.training
    assert device_name() == "CPU"


def test_a_model_mlx_lm_does_not_know_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    with pytest.raises(InputError, match="nonesuch not supported"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match="mlx_lm cannot load this model"):
        load_model(folder)


def test_importing_mlx_lm_leaves_the_limit_on_open_files() -> None:
    code = (
        "import resource\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (900, hard))\n"
        "from tasks.models.mlx_lm_import import import_mlx_lm\n"
        "import_mlx_lm()\n"
        "print((900, hard) == resource.getrlimit(resource.RLIMIT_NOFILE), resource.setrlimit.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "setrlimit"]
