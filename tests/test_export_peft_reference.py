"""PEFT with PyTorch is asked: its adapters and ours are the same functions of the same base.

It is no dependency: TUNESMITH_PEFT_PYTHON names the interpreter of an environment that has
`pip install peft torch transformers`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY_LLAMA
from tiny_networks import COMMON, CONFIGS

from tasks.config import ModelSettings, TrainSettings
from tasks.export.hf_folder import write_hf_folder
from tasks.export.peft import write_peft
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.models.origin import Origin
from tasks.models.resolve import resolve_model
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, load_adapter, save_adapter
from tasks.train.outline import outline
from tasks.train.peft_import import as_mlx_adapter
from tasks.train.peft_layout import FAMILIES
from tasks.train.soft_prompt import prefix_ids
from tasks.train.targets import adaptable, target_keys

PYTHON = os.environ.get("TUNESMITH_PEFT_PYTHON")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TUNESMITH_PEFT_PYTHON names no interpreter with peft and torch"),
]

IDS = [5, 6, 7, 8, 9, 10, 250, 300, 12, 5]


def ask(*arguments: object) -> None:
    """Run the reference; its errors are shown whole."""
    assert PYTHON is not None
    script = Path(__file__).with_name("peft_reference.py")
    asked = [PYTHON, str(script), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    answer = subprocess.run(asked, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr[-3000:]


def written(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest, of the largest logit."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def our_logits(base: Path, adapter: Path | None) -> np.ndarray:
    network = load_model(base).model
    if adapter:
        load_adapter(network, adapter)
    prefix = prefix_ids(network)
    return np.array(network(mx.array([prefix + IDS])))[0][len(prefix) :]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))


def test_adapters_that_peft_made_compute_the_same_here_and_go_back_as_they_came(
    tmp_path: Path, tiny_model: ModelFolder
) -> None:
    ask("make", tiny_model.path, written(tmp_path / "ids.json", IDS), tmp_path / "made")
    expected = np.load(tmp_path / "made" / "logits.npz")
    plain = our_logits(tiny_model.path, None)
    for case in sorted(expected.files):
        folder = tmp_path / "made" / case
        adapter = as_mlx_adapter(folder, tiny_model)
        theirs = expected[case][-len(IDS) :]
        assert difference(our_logits(tiny_model.path, adapter), theirs) < 1e-5, case
        assert difference(plain, theirs) > 0.01, case
        if case not in ("patterns", "some-layers"):
            back = tmp_path / "back" / case
            back.mkdir(parents=True)
            write_peft(back, adapter, tiny_model, Origin(None, {}))
            before, after = tensors(folder), tensors(back)
            assert before.keys() == after.keys()
            assert all(before[name].tobytes() == after[name].tobytes() for name in before), case


@pytest.mark.real
def test_exports_of_the_bundled_model_have_our_logits_in_peft(tmp_path: Path) -> None:
    model = resolve_model(ModelSettings(dequantize=True))
    folders = []
    methods: list[dict[str, Any]] = [
        {"method": "lora", "num_layers": 8, "rank": 8},
        {"method": "dora", "num_layers": -1, "targets": ["attention"], "rank": 4, "scale": 2.5},
        {"method": "soft-prompt"},
    ]
    for changes in methods:
        settings = TrainSettings.model_validate(changes)
        network = load_model(model.path).model
        keys = target_keys(network, settings.targets, settings.num_layers)
        config = adapter_config(settings, len(network.layers), keys)
        add_adapter(network, config, 1)
        random = np.random.default_rng(1)
        weights = {
            name: array + mx.array(random.normal(0, 0.02, array.shape).astype(np.float32))
            for name, array in adapter_weights(network).items()
        }
        adapter, export = tmp_path / f"mlx-{settings.method}", tmp_path / settings.method
        adapter.mkdir()
        export.mkdir()
        save_adapter(adapter, weights, config)
        write_peft(export, adapter, model, Origin(None, {}))
        folders.append((adapter, export))
    ids = written(tmp_path / "ids.json", IDS)
    ask("logits", model.path, ids, tmp_path / "theirs.npz", *(export for _, export in folders))
    theirs = np.load(tmp_path / "theirs.npz")
    assert difference(our_logits(model.path, None), theirs["base"]) < 1e-3
    for adapter, export in folders:
        found = theirs[export.name][-len(IDS) :]
        apart, changed = difference(our_logits(model.path, adapter), found), difference(theirs["base"], found)
        print(f"{export.name}: {apart:.2e} from PEFT, {changed:.2e} from the base")
        assert apart < 1e-3
        assert changed > 0.02


def test_modules_have_the_names_that_transformers_gives_them(tmp_path: Path) -> None:
    configs = {kind: COMMON | CONFIGS.get(kind, {}) | MORE.get(kind, {}) for kind in sorted(FAMILIES)}
    configs = {kind: {**config, "model_type": kind} for kind, config in configs.items()}
    ask("names", written(tmp_path / "configs.json", configs), tmp_path / "names.json")
    theirs = json.loads((tmp_path / "names.json").read_text())
    for kind, config in configs.items():
        ours = [path for path, module in outline(config).named_modules() if adaptable(module)]
        assert sorted(set(ours) - {"lm_head"}) == theirs[kind], kind


def test_transformers_loads_a_model_in_the_hubs_layout(tmp_path: Path, tiny_model: ModelFolder) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    write_hf_folder(folder, tiny_model.path)
    ask("logits", folder, written(tmp_path / "ids.json", IDS), tmp_path / "theirs.npz")
    theirs = np.load(tmp_path / "theirs.npz")["base"]
    assert theirs.shape == (len(IDS), TINY_LLAMA["vocab_size"])
    assert difference(our_logits(tiny_model.path, None), theirs) < 1e-5


HALF_ROTARY = {"attention_bias": False, "partial_rotary_factor": 0.5}
MORE: dict[str, dict[str, Any]] = {
    "cohere": {"layer_norm_eps": 1e-5, "logit_scale": 0.25},
    "exaone4": {
        "sliding_window": 8,
        "sliding_window_pattern": "LLLG",
        "rope_scaling": None,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "glm": HALF_ROTARY,
    "glm4": HALF_ROTARY,
    "granite": {
        "logits_scaling": 1.0,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "helium": {"attention_bias": False, "mlp_bias": False},
    "ernie4_5": {"use_bias": False},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "olmo3": {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "seed_oss": {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False},
    "stablelm": {
        "layer_norm_eps": 1e-5,
        "use_qkv_bias": False,
        "partial_rotary_factor": 0.5,
        "rope_pct": 0.5,
    },
    "starcoder2": {"norm_epsilon": 1e-5},
}
"""What mlx-lm asks for in the config of a family."""
