"""Adapter folders as PEFT 0.21 writes them, of random numbers, without PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

WIDTHS = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
WIDTHS |= {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
"""(inputs, outputs) of the modules of the tiny Llama."""

CONFIG: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "owner/tiny",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "down_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def peft_tensors(
    modules: Iterable[str] = ("self_attn.q_proj", "mlp.down_proj"),
    layers: Iterable[int] = range(4),
    rank: int = 4,
    dora: bool = False,
) -> dict[str, np.ndarray]:
    """Random A, B and magnitudes of modules of the tiny Llama."""
    random = np.random.default_rng(5)
    tensors = {}
    for layer in layers:
        for module in modules:
            inputs, outputs = WIDTHS[module.rpartition(".")[2]]
            stem = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{stem}.lora_A.weight"] = random.normal(0, 0.3, (rank, inputs))
            tensors[f"{stem}.lora_B.weight"] = random.normal(0, 0.3, (outputs, rank))
            if dora:
                tensors[f"{stem}.lora_magnitude_vector"] = random.uniform(0.5, 1.5, outputs)
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def write_peft_folder(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """A folder with PEFT's two files; `config` changes the defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config, indent=2))
    save_file(peft_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder
