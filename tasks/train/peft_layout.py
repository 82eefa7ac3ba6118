"""Adapters in the layout of Hugging Face's PEFT beside mlx-lm's: names of files and of tensors.

    mlx-lm   model.layers.3.self_attn.q_proj.lora_a                            (inputs, rank)
    PEFT     base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight    (rank, inputs)

Both name a module by its place in the network, so an adapter can only pass from one to the other where
mlx-lm names the modules as transformers does: in the families below.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tasks.errors import InputError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

PROMPT_TENSOR = "prompt_embeddings"  # (prompt_tokens, hidden)

PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
"""The arrays of an adapted module: A and B, which are transposed, and DoRA's magnitudes."""

FAMILIES = {
    *("cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite"),
    *("helium", "hunyuan_v1_dense", "llama", "mistral", "nemotron", "olmo2", "olmo3", "phi3", "qwen2"),
    *("qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2"),
}
"""model_type of those whose linear modules have equal names: mlx_lm 0.32.2 beside transformers 5.23."""

ATTENTION_FAMILIES = {"mixtral", "qwen2_moe", "qwen3_moe"}
"""Those of which that is true of the attention only: mlx-lm stacks the experts."""

SCALED_EMBEDDINGS = {"gemma", "gemma2", "gemma3_text"}
"""Those where mlx-lm multiplies the embeddings, a soft prompt among them, and transformers does not."""

_PREFIX = "base_model.model."
_PEFT_NAME = re.compile(rf"{re.escape(_PREFIX)}(.+)\.({'|'.join(map(re.escape, PARTS.values()))})")


def peft_name(name: str) -> str:
    """What PEFT calls the tensor that is `name` in mlx-lm's layout."""
    module, _, part = name.rpartition(".")
    return f"{_PREFIX}{module}.{PARTS[part]}"


def module_and_part(name: str) -> tuple[str, str] | None:
    """Of one of PEFT's tensors the path of its module and mlx-lm's name of the part; None of any other."""
    match = _PEFT_NAME.fullmatch(name)
    if match is None:
        return None
    parts = {theirs: ours for ours, theirs in PARTS.items()}
    return match[1], parts[match[2]]


def check_family(model_type: str, modules: Iterable[str]) -> None:
    """Refuse a base whose modules may be called something else in transformers.

    Args:
        model_type: of the base's `config.json`.
        modules: paths of those adapted, within a layer or whole.
    """
    if model_type in FAMILIES:
        return
    if model_type not in ATTENTION_FAMILIES:
        raise InputError(
            f"a base of model_type '{model_type}': its modules may have other names in transformers than in "
            "mlx-lm, so its adapters cannot pass between PEFT and MLX; fuse it and export the whole model "
            f"(--to hf). Of the same names are {', '.join(sorted(FAMILIES | ATTENTION_FAMILIES))}"
        )
    if others := sorted(path for path in modules if "self_attn." not in path):
        raise InputError(
            f"a base of model_type '{model_type}': its experts are stacked in mlx-lm and not in "
            f"transformers, so an adapter of {others[0]} cannot pass between PEFT and MLX; adapt the "
            "attention alone (train.targets=[attention]), or export the whole model (--to hf)"
        )


def check_prompt_family(model_type: str) -> None:
    """Refuse a base on which a soft prompt of PEFT's and ours would not be the same vectors."""
    if model_type not in FAMILIES - SCALED_EMBEDDINGS:
        allowed = ", ".join(sorted(FAMILIES - SCALED_EMBEDDINGS))
        raise InputError(
            f"a base of model_type '{model_type}': its embeddings may be scaled in mlx-lm and not in "
            f"transformers, so a soft prompt cannot pass between PEFT and MLX; it can for {allowed}"
        )
