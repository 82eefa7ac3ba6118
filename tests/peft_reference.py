"""What PEFT and transformers make of adapters and models: logits, adapters and names of modules, in files.

Run by the tests marked `slow` with the interpreter that TUNESMITH_PEFT_PYTHON names, in whose environment
peft, torch and transformers are installed; nothing of Tunesmith is imported.

    python peft_reference.py logits BASE IDS.json OUT.npz [ADAPTER …]    of BASE alone too, as "base"
    python peft_reference.py make BASE IDS.json OUT                      OUT/<case> and OUT/logits.npz
    python peft_reference.py names CONFIGS.json OUT.json                 linear modules by model_type
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "last-layers": {
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "layers_to_transform": [2, 3],
        "layers_pattern": "layers",
    },
    "stabilised": {"target_modules": ["down_proj"], "use_rslora": True, "lora_alpha": 3},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2, "model.layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"^model.layers.2.self_attn.q_proj": 5},
    },
    "some-layers": {"target_modules": ["o_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "expression": {"target_modules": r".*\.self_attn\.(q|o)_proj"},
}
"""LoraConfigs, each of what the import has to understand."""


def main() -> None:
    """Do what the first argument says."""
    torch.set_num_threads(2)
    what, *rest = sys.argv[1:]
    {"logits": write_logits, "make": make_adapters, "names": write_names}[what](*rest)


def write_logits(base: str, ids: str, out: str, *adapters: str) -> None:
    """Logits of the base alone and with each adapter, by the adapter folder's name."""
    found = {"base": logits(load(base), ids)}
    for adapter in adapters:
        found[Path(adapter).name] = logits(PeftModel.from_pretrained(load(base), adapter), ids)
    np.savez(out, **found)


def make_adapters(base: str, ids: str, out: str) -> None:
    """An adapter of each case with random weights, as PEFT saves it, and its logits."""
    found = {}
    configs: dict[str, Any] = {
        name: LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **case})
        for name, case in CASES.items()
    }
    configs["prompt"] = PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    for name, config in configs.items():
        torch.manual_seed(7)
        model = get_peft_model(load(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(f"{out}/{name}")
        found[name] = logits(model, ids)
    np.savez(f"{out}/logits.npz", **found)


def write_names(configs: str, out: str) -> None:
    """The linear modules of each config's network but the head, in transformers' names; no weights."""
    found = {}
    for kind, config in json.loads(Path(configs).read_text()).items():
        kept = {key: value for key, value in config.items() if key != "model_type"}
        described = AutoConfig.for_model(config["model_type"], **kept, pad_token_id=0)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described)
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        found[kind] = sorted(set(linear) - {"lm_head"})
    Path(out).write_text(json.dumps(found))


def load(base: str) -> Any:
    """A model folder in float32, as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def logits(model: Any, ids: str) -> np.ndarray:
    """(length, vocabulary), of one row of token ids."""
    row = torch.tensor([json.loads(Path(ids).read_text())])
    model.eval()
    with torch.no_grad():
        return model(input_ids=row).logits[0].float().numpy()


main()
