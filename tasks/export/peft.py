"""An adapter as Hugging Face's PEFT loads it: `PeftModel.from_pretrained(base, folder)`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tasks.errors import InputError
from tasks.models.folder import ModelFolder
from tasks.models.origin import Origin
from tasks.publish import write_json
from tasks.train import full, soft_prompt
from tasks.train.adapters import read_adapter, read_adapter_config
from tasks.train.outline import outline
from tasks.train.peft_config import LOW_RANK, PROMPT
from tasks.train.peft_import import ORIGIN_FILE
from tasks.train.peft_layout import (
    CONFIG_FILE,
    PROMPT_TENSOR,
    WEIGHTS_FILE,
    check_family,
    check_prompt_family,
    peft_name,
)
from tasks.train.step import TRAINING_FILE


def write_peft(folder: Path, adapter: Path, model: ModelFolder, origin: Origin) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` of an adapter in mlx-lm's layout.

    Numbers and types stay as they are, so reading it back gives equal bytes.

    Args:
        folder: empty, to write into.
        adapter: trained on `model`.
        origin: of the base; PEFT keeps its name.

    Raises:
        InputError: the adapter is not sound, is the base's own weights (full training), or its base has
            other names for its modules in transformers.
    """
    kind = read_adapter_config(adapter)["fine_tune_type"]
    if kind == full.KIND:
        raise InputError(
            f"{adapter}: full training has changed the base's own weights, there is no adapter to give to "
            "PEFT; export the whole model instead: --to hf"
        )
    network = outline(model.config())
    config, weights = read_adapter(adapter, network)
    model_type = model.config()["model_type"]
    if kind == soft_prompt.KIND:
        check_prompt_family(model_type)
        tensors = {PROMPT_TENSOR: next(iter(weights.values()))}
        values = _prompt_values(tensors[PROMPT_TENSOR], model.config())
    else:
        modules = sorted({name.rpartition(".")[0] for name in weights})
        check_family(model_type, modules)
        tensors = {peft_name(name): _turned(name, array) for name, array in weights.items()}
        values = _low_rank_values(config, modules, network, _recorded(adapter))
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": origin.repo or model.name}
    mx.save_safetensors(str(folder / WEIGHTS_FILE), dict(sorted(tensors.items())), {"format": "pt"})
    write_json(folder / CONFIG_FILE, {**values, **common, "inference_mode": True})


def _turned(name: str, array: mx.array) -> mx.array:
    """A as (rank, inputs), B as (outputs, rank); magnitudes as they are."""
    return array if name.endswith(".m") else mx.transpose(array)


def _low_rank_values(
    config: Mapping[str, Any], modules: Iterable[str], network: nn.Module, recorded: Mapping[str, Any]
) -> dict[str, Any]:
    """What PEFT's LoraConfig is to hold; it knows the defaults of the rest."""
    parameters, layers = config["lora_parameters"], len(network.layers)
    first = layers - config["num_layers"]
    pattern = _layers_path(network).rpartition(".")[2]
    return {
        "peft_type": LOW_RANK,
        "r": parameters["rank"],
        **_alpha(parameters["rank"], parameters["scale"], recorded),
        "lora_dropout": parameters["dropout"],
        "target_modules": _targets(modules, network, first),
        "layers_to_transform": list(range(first, layers)) if first else None,
        "layers_pattern": pattern if first else None,
        "use_dora": config["fine_tune_type"] == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def _alpha(rank: int, scale: float, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """alpha as it was set where that gives this scale in PEFT too, else the one that does."""
    alpha, stabilised = recorded.get("alpha"), bool(recorded.get("rank_stabilized"))
    if alpha is None or alpha / (rank**0.5 if stabilised else rank) != scale:
        alpha, stabilised = scale * rank, False
    if abs(alpha - round(alpha)) < 1e-9 * alpha:
        alpha = round(alpha)
    return {"lora_alpha": alpha, "use_rslora": stabilised}


def _recorded(adapter: Path) -> dict[str, Any]:
    """`alpha` and `rank_stabilized` as trained with here or elsewhere, where a file beside says so."""
    for name in (TRAINING_FILE, ORIGIN_FILE):
        if (adapter / name).is_file():
            record = json.loads((adapter / name).read_text(encoding="utf-8"))
            if name == TRAINING_FILE:
                return dict(record.get("inputs", {}).get("settings", {}))
            theirs = record["config"]
            return {"alpha": theirs.get("lora_alpha"), "rank_stabilized": theirs.get("use_rslora")}
    return {}


def _targets(modules: Iterable[str], network: nn.Module, first_layer: int) -> list[str]:
    """The shortest names by which PEFT, which looks at the ends of paths, finds these modules and no other.

    Args:
        first_layer: from which on `layers_to_transform` lets it look; 0 for the whole network.
    """
    layers = _layers_path(network)
    inside = tuple(f"{layers}.{index}." for index in range(first_layer, len(network.layers)))
    everywhere = [path for path, _ in network.named_modules() if not first_layer or path.startswith(inside)]
    wanted = set(modules)
    targets = set()
    for module in wanted:
        parts = module.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        targets.add(next(end for end in ends if wanted.issuperset(_ending(everywhere, end))))
    return sorted(targets)


def _ending(paths: Iterable[str], end: str) -> list[str]:
    return [path for path in paths if path == end or path.endswith(f".{end}")]


def _layers_path(network: nn.Module) -> str:
    """Where the layers are, as "model.layers"."""
    first = network.layers[0]
    return next(str(path) for path, module in network.named_modules() if module is first).rpartition(".")[0]


def _prompt_values(prompt: mx.array, base: Mapping[str, Any]) -> dict[str, Any]:
    """What PEFT's PromptTuningConfig is to hold."""
    return {
        "peft_type": PROMPT,
        "num_virtual_tokens": prompt.shape[0],
        "token_dim": prompt.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": base["num_attention_heads"],
        "num_layers": base["num_hidden_layers"],
        "prompt_tuning_init": "RANDOM",
    }
