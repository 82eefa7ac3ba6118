"""A model folder loads in float32 on CPU, with an adapter that fits or none, and touches nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_models_gguf import IDS, Q4_0, write_tiny_gguf

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


def write_adapter(folder: Path, target: Path, **changes: Any) -> Path:
    """A random LoRA of rank 2 on the last layer, as mlx_lm writes it; `changes` lie over its tensors."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}
    model = load_model(folder).model
    model.freeze()
    linear_to_lora_layers(model, 1, parameters)
    names = sorted(tree_flatten(model.trainable_parameters()))
    draw = np.random.default_rng(3)
    weights = {name: mx.array(draw.standard_normal(value.shape).astype(np.float32)) for name, value in names}
    weights = {name: value for name, value in {**weights, **changes}.items() if value is not None}
    target.mkdir()
    mx.save_safetensors(str(target / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


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


def test_an_adapter_changes_the_logits_by_its_low_rank_product(tmp_path: Path, folder: Path) -> None:
    import mlx.core as mx

    adapter = write_adapter(folder, tmp_path / "adapter")
    tuned, plain = load_model(folder, adapter).model, load_model(folder).model
    weights = mx.load(str(adapter / "adapters.safetensors"))
    for part in ("q_proj", "v_proj"):
        layer = getattr(plain.model.layers[1].self_attn, part)
        name = f"model.layers.1.self_attn.{part}"
        layer.weight = layer.weight + 2.0 * (weights[f"{name}.lora_a"] @ weights[f"{name}.lora_b"]).T
    np.testing.assert_allclose(np.array(tuned(IDS)), np.array(plain(IDS)), atol=1e-4)
    assert not np.allclose(np.array(tuned(IDS)), np.array(load_model(folder).model(IDS)), atol=1e-2)


def test_an_adapter_that_fits_only_in_part_is_refused(tmp_path: Path, folder: Path) -> None:
    import mlx.core as mx

    name = "model.layers.1.self_attn.q_proj.lora_b"
    for index, (value, reason) in enumerate(
        [
            (None, f"lacks 1 tensors .* first {name}"),
            (mx.zeros((3, 64)), "does not match"),
            (mx.full((2, 64), float("inf")), "infinities or NaN"),
        ]
    ):
        adapter = write_adapter(folder, tmp_path / f"adapter{index}", **{name: value})
        with pytest.raises(InputError, match=reason):
            load_model(folder, adapter)


def test_a_folder_without_an_adapter_and_a_full_fine_tune_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        load_model(folder, tmp_path)
    adapter = write_adapter(folder, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "fine_tune_type": "full"}))
    with pytest.raises(InputError, match="fine_tune_type = 'full'"):
        load_model(folder, adapter)


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
