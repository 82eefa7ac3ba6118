"""What is trained, put onto a base model, and its files in mlx-lm's own layout, loaded strictly.

LoRA, DoRA and full training are read by `mlx_lm.generate --adapter-path`, `mlx_lm.fuse` and `mlx_lm.server`
as they are; a soft prompt is in the same two files, which mlx-lm cannot read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tasks.config import TrainSettings
from tasks.errors import InputError
from tasks.models.safety import check_safetensors
from tasks.train import full, low_rank, soft_prompt
from tasks.train.targets import ALL_LINEAR

WEIGHTS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"

KINDS = (*low_rank.KINDS, full.KIND, soft_prompt.KIND)

LARGEST_SCALE = 1e4
"""Far over any alpha / rank in use; beyond it a damaged file is likelier than a meaning."""


def adapter_config(
    settings: TrainSettings, layers_in_model: int, keys: Sequence[str] | None = None
) -> dict[str, Any]:
    """`adapter_config.json` as mlx-lm reads it.

    Args:
        settings: `num_layers` = -1 becomes the number of layers, but for full training, where it
            means the embeddings and the head too.
        layers_in_model: the transformer layers of the model.
        keys: `target_keys(model, settings.targets, settings.num_layers)`; without them mlx-lm adapts
            every linear module of a layer.

    Raises:
        InputError: more layers are asked for than the model has.
        ValueError: the settings name modules, and `keys` are not given.
    """
    if settings.method == soft_prompt.KIND:
        return {"fine_tune_type": soft_prompt.KIND, "prompt_tokens": settings.prompt_tokens}
    if settings.num_layers > layers_in_model:
        raise InputError(
            f"train.num_layers = {settings.num_layers}: the model has {layers_in_model} layers; "
            f"give 1 to {layers_in_model}, or -1 for all"
        )
    if settings.method == full.KIND:
        return {"fine_tune_type": full.KIND, "num_layers": settings.num_layers}
    if keys is None and settings.targets != (ALL_LINEAR,):
        raise ValueError("settings.targets name modules of the model: give their keys")
    return {
        "fine_tune_type": settings.method,
        "num_layers": layers_in_model if settings.num_layers == -1 else settings.num_layers,
        "lora_parameters": {
            "rank": settings.rank,
            "scale": low_rank.low_rank_scale(settings),
            "dropout": settings.dropout,
            **({} if keys is None else {"keys": list(keys)}),
        },
    }


def add_adapter(model: nn.Module, config: dict[str, Any], seed: int) -> None:
    """Freeze the model but for what `config` trains, and begin that from `seed`, ready to train.

    Raises:
        InputError: the model does not allow this kind of training.
    """
    _make_trainable(model, config)
    if config["fine_tune_type"] in low_rank.KINDS:
        low_rank.draw(model, seed)
    elif config["fine_tune_type"] == soft_prompt.KIND:
        soft_prompt.draw(model, seed)


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
        InputError: it is of no known kind, or names, shapes or finiteness are not what its own config
            and the base imply (mlx-lm loads such files without a word).
    """
    config = read_adapter_config(folder)
    _put_on(model, config, folder)
    weights = checked_weights(folder, adapter_weights(model))
    model.load_weights(list(weights.items()), strict=False)
    model.eval()


def read_adapter(folder: Path, network: nn.Module) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """A saved adapter's config and weights, checked as `load_adapter` does, without the base's weights.

    Args:
        network: the base's `outline`, onto which the adapter is put.
    """
    config = read_adapter_config(folder)
    _put_on(network, config, folder)
    return config, checked_weights(folder, adapter_weights(network))


def checked_weights(folder: Path, expected: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The arrays of an adapter's file, which have to be those expected, by name and shape, and finite.

    Raises:
        InputError: names the file, the tensor and what it should be.
    """
    path = folder / WEIGHTS_FILE
    check_safetensors(path)
    weights: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
    if odd := sorted(set(expected) ^ set(weights)):
        raise InputError(f"{path}: {len(odd)} tensors missing or unknown, first {odd[0]}")
    for name, array in sorted(weights.items()):
        if array.shape != expected[name].shape:
            raise InputError(f"{path}: {name} is {array.shape}, expected {expected[name].shape}")
        if not mx.isfinite(array).all().item():
            raise InputError(f"{path}: {name} holds NaN or infinity; train again")
    return weights


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter folder's `adapter_config.json`, checked.

    Raises:
        InputError: files are missing, or it is neither ours nor mlx-lm's.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: has no {name}; give an adapter folder as mlx_lm writes it")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder / CONFIG_FILE}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG_FILE}: holds a {type(config).__name__}, expected an object")
    config.setdefault("fine_tune_type", "lora")
    if fault := _fault(config):
        raise InputError(f"{folder / CONFIG_FILE}: {fault}")
    return config


def _put_on(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    if config.get("num_layers", 0) > len(model.layers):
        raise InputError(
            f"{folder / CONFIG_FILE}: num_layers = {config['num_layers']}, the base model has "
            f"{len(model.layers)}; give the adapter's own base model"
        )
    _make_trainable(model, config)


def _fault(config: dict[str, Any]) -> str | None:
    """What is wrong with an adapter's config, if anything."""
    kind, layers = config["fine_tune_type"], config.get("num_layers")
    if kind not in KINDS:
        return f"fine_tune_type = {kind!r}; it can be {', '.join(KINDS)}"
    if kind == soft_prompt.KIND:
        count = config.get("prompt_tokens")
        return None if _is_count(count) else f"prompt_tokens = {count!r}; expected a number from 1 up"
    if not _is_count(layers) and not (kind == full.KIND and layers == -1):
        return f"num_layers = {layers!r}; expected a number of layers from 1 up"
    if kind == full.KIND:
        return None
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or not {"rank", "scale", "dropout"} <= parameters.keys():
        return "lora_parameters need rank, scale and dropout"
    if not _is_count(parameters["rank"]):
        return f"rank = {parameters['rank']!r}; expected a number from 1 up"
    scale = parameters["scale"]
    if not isinstance(scale, int | float) or not math.isfinite(scale) or abs(scale) > LARGEST_SCALE:
        return f"scale = {scale!r}; expected a number up to {LARGEST_SCALE:g}"
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _make_trainable(model: nn.Module, config: dict[str, Any]) -> None:
    model.freeze()
    if config["fine_tune_type"] == soft_prompt.KIND:
        soft_prompt.put_in_front(model, config["prompt_tokens"])
    elif config["fine_tune_type"] == full.KIND:
        full.unfreeze(model, config["num_layers"])
    else:
        low_rank.wrap(model, config)
