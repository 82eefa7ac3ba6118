"""LoRA adapters in mlx-lm's own layers and file layout, initialised from a seed and loaded strictly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tasks.config import TrainSettings
from tasks.errors import InputError
from tasks.models.mlx_lm_import import import_mlx_lm
from tasks.models.safety import check_safetensors

WEIGHTS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"


def adapter_config(settings: TrainSettings, layers_in_model: int) -> dict[str, Any]:
    """`adapter_config.json` as mlx-lm reads it.

    Raises:
        InputError: more layers are asked for than the model has.
    """
    num_layers = layers_in_model if settings.num_layers == -1 else settings.num_layers
    if num_layers > layers_in_model:
        raise InputError(
            f"train.num_layers = {num_layers}: the model has {layers_in_model} layers; "
            f"give 1 to {layers_in_model}, or -1 for all"
        )
    return {
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": settings.rank,
            "scale": settings.alpha / settings.rank,
            "dropout": settings.dropout,
        },
    }


def add_adapter(model: nn.Module, config: dict[str, Any], seed: int) -> None:
    """Freeze the model and wrap the linear layers of its last layers in LoRA, ready to train.

    A is uniform in ±1/√(input width), drawn from `seed` in the order of the sorted names; B is
    zero, so that the model's output is unchanged (Hu et al. 2021, arXiv:2106.09685).
    """
    _wrap_in_lora(model, config)
    down = {name: array for name, array in adapter_weights(model).items() if name.endswith("lora_a")}
    keys = mx.random.split(mx.random.key(seed), len(down))
    drawn = []
    for (name, array), key in zip(down.items(), keys, strict=True):
        bound = 1 / math.sqrt(array.shape[-2])
        drawn.append((name, mx.random.uniform(-bound, bound, array.shape, key=key)))
    model.load_weights(drawn, strict=False)


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The trainable arrays by name, in sorted order."""
    return dict(sorted(dict(tree_flatten(model.trainable_parameters())).items()))


def count_parameters(weights: dict[str, mx.array]) -> int:
    """Numbers in the given arrays."""
    return sum(array.size for array in weights.values())


def save_adapter(folder: Path, weights: dict[str, mx.array], config: dict[str, Any]) -> None:
    """Write the adapter as `mlx_lm.generate --adapter-path` and `mlx_lm.fuse` read it."""
    mx.save_safetensors(str(folder / WEIGHTS_FILE), weights)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put a saved adapter onto its base model, every tensor accounted for.

    Raises:
        InputError: it is no LoRA adapter, or names, shapes or finiteness are not what its own config
            implies (mlx-lm loads such files without a word).
    """
    config = _read_config(folder)
    check_safetensors(folder / WEIGHTS_FILE)
    _wrap_in_lora(model, config)
    expected = adapter_weights(model)
    weights: dict[str, mx.array] = mx.load(str(folder / WEIGHTS_FILE))  # type: ignore[assignment]
    if odd := sorted(set(expected) ^ set(weights)):
        raise InputError(f"{folder / WEIGHTS_FILE}: {len(odd)} tensors missing or unknown, first {odd[0]}")
    for name, array in weights.items():
        if array.shape != expected[name].shape:
            raise InputError(
                f"{folder / WEIGHTS_FILE}: {name} is {array.shape}, expected {expected[name].shape}"
            )
        if not mx.isfinite(array).all().item():
            raise InputError(f"{folder / WEIGHTS_FILE}: {name} holds NaN or infinity; train again")
    model.load_weights(list(weights.items()), strict=False)
    model.eval()


def _read_config(folder: Path) -> dict[str, Any]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: has no {name}; give an adapter folder as mlx_lm writes it")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder / CONFIG_FILE}: not JSON ({error})") from None
    if (kind := config.get("fine_tune_type", "lora")) != "lora":
        raise InputError(f"{folder / CONFIG_FILE}: fine_tune_type = '{kind}'; only 'lora' can be loaded")
    return config


def _wrap_in_lora(model: nn.Module, config: dict[str, Any]) -> None:
    import_mlx_lm()
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"])
