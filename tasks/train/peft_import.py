"""An adapter trained elsewhere with PEFT, made into one of mlx-lm's layout: to train on from, or to evaluate.

mlx-lm's layout has one rank and one scale, and the same modules in each of the last N layers. An adapter of
several ranks or scales, or of other layers, still fits: smaller matrices are filled up with zeros, which
stay zeros in training, since the gradient of A is through B and the other way round, and another scale goes
into B. Both compute the same; only where a scale moved does training go on with other steps for that B.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tasks.errors import InputError
from tasks.home import cache_dir
from tasks.models.fingerprints import file_digest
from tasks.models.folder import ModelFolder
from tasks.models.gguf_import import as_folder_name
from tasks.models.safety import check_safetensors
from tasks.publish import code_version, fingerprint, publishing, write_json
from tasks.train import soft_prompt
from tasks.train.adapters import adapter_weights, add_adapter, save_adapter
from tasks.train.outline import outline
from tasks.train.peft_config import LOW_RANK, PeftConfig, is_peft, read_peft_config
from tasks.train.peft_layout import (
    CONFIG_FILE,
    PROMPT_TENSOR,
    WEIGHTS_FILE,
    check_family,
    check_prompt_family,
    module_and_part,
)
from tasks.train.quantised_base import check_base
from tasks.train.targets import adaptable

log = logging.getLogger(__name__)

ORIGIN_FILE = "origin.json"
"""PEFT's own config, as it came, and what had to be changed."""

TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Converted:
    """An adapter in mlx-lm's layout.

    Attributes:
        config: its `adapter_config.json`.
        weights: its arrays by name, in PEFT's type.
        changes: what did not fit as it was, in words.
    """

    config: dict[str, Any]
    weights: dict[str, mx.array]
    changes: list[str]


def as_mlx_adapter(folder: Path, model: ModelFolder) -> Path:
    """The adapter of `folder` in mlx-lm's layout: itself, or of one of PEFT's a folder in the cache.

    Raises:
        InputError: it is not sound, is not for this base, or does what mlx-lm's layers cannot.
    """
    if not is_peft(folder):
        return folder
    peft = read_peft_config(folder)
    files = {name: file_digest(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    inputs = {"adapter": files, "model": model.fingerprint, "code": code_version("train")}
    target = cache_dir() / "adapters" / f"{as_folder_name(folder.resolve().name)}-{fingerprint(inputs)}"
    if target.is_dir():
        return target
    converted = from_peft(peft, model.config())
    with publishing(target) as draft:
        save_adapter(draft, converted.weights, converted.config)
        origin = {"layout": "peft", "config": peft.values, "changes": converted.changes}
        write_json(draft / ORIGIN_FILE, origin)
    for change in converted.changes:
        log.warning("%s: %s", folder, change)
    log.info("%s: converted from PEFT's layout into %s", folder, target)
    return target


def from_peft(peft: PeftConfig, base: Mapping[str, Any]) -> Converted:
    """Config and weights in mlx-lm's layout.

    Args:
        peft: of `read_peft_config`; the weights lie beside its file.
        base: the `config.json` of the base model.
    """
    path = peft.path.with_name(WEIGHTS_FILE)
    tensors = _load(path)
    network = outline(base)
    if peft.kind == LOW_RANK:
        return _low_rank(peft, path, tensors, network, base)
    return _prompt(peft, path, tensors, network, base)


def _load(path: Path) -> dict[str, mx.array]:
    """The tensors of a file, which have to be finite numbers of a type that both sides have."""
    from safetensors import safe_open

    check_safetensors(path)
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118  (it is no mapping)
            if (dtype := file.get_slice(name).get_dtype()) not in TYPES:
                raise InputError(f"{path}: {name} is of type {dtype}; expected one of {', '.join(TYPES)}")
    tensors: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
    for name, array in sorted(tensors.items()):
        if not mx.isfinite(array).all().item():
            raise InputError(f"{path}: {name} holds NaN or infinity; give an adapter that was trained well")
    return tensors


def _low_rank(
    peft: PeftConfig,
    path: Path,
    tensors: Mapping[str, mx.array],
    network: nn.Module,
    base: Mapping[str, Any],
) -> Converted:
    modules = _by_module(path, tensors)
    check_family(base["model_type"], modules)
    check_base(peft.method, base)
    places = _places(path, modules, network)
    for module, parts in modules.items():
        _check_module(peft, path, module, parts)
    rank = max(map(peft.rank, modules))
    scale = Counter(map(peft.scale, modules)).most_common(1)[0][0]
    weights = {
        f"{module}.{part}": array
        for module, parts in modules.items()
        for part, array in _fitted(parts, rank, peft.scale(module) / scale).items()
    }
    config = {
        "fine_tune_type": peft.method,
        "num_layers": len(network.layers) - min(layer for layer, _ in places.values()),
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": peft.dropout,
            "keys": sorted({within for _, within in places.values()}),
        },
    }
    add_adapter(network, config, seed=0)
    expected = adapter_weights(network)
    _check_widths(path, weights, expected)
    filling = _filling(path, peft, expected, weights)
    changes = _changes(peft, modules, rank, scale, len(expected) - len(weights))
    return Converted(config, dict(sorted({**weights, **filling}.items())), changes)


def _by_module(path: Path, tensors: Mapping[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    """The arrays of each adapted module, by its path and mlx-lm's names of the parts."""
    modules: dict[str, dict[str, mx.array]] = {}
    for name, array in sorted(tensors.items()):
        found = module_and_part(name)
        if found is None:
            raise InputError(
                f"{path}: {name} is no matrix of LoRA on a linear module (embeddings and whole modules "
                "cannot be read); merge the adapter into its base with PEFT and use the merged model"
            )
        module, part = found
        modules.setdefault(module, {})[part] = array
    if not modules:
        raise InputError(f"{path}: holds no tensors; give an adapter that was trained")
    return modules


def _places(path: Path, modules: Iterable[str], network: nn.Module) -> dict[str, tuple[int, str]]:
    """Of each module the index of its layer, and its path within the layer."""
    known = {
        f"{prefix}.{within}": (index, within)
        for index, prefix, layer in _layers(network)
        for within, module in layer.named_modules()
        if adaptable(module)
    }
    if odd := sorted(set(modules) - set(known)):
        raise InputError(
            f"{path}: the layers of the base have no linear module {odd[0]}; give the adapter's own base "
            "model, and an adapter of modules in its layers alone"
        )
    return {module: known[module] for module in modules}


def _layers(network: nn.Module) -> Iterable[tuple[int, str, nn.Module]]:
    named = {id(module): path for path, module in network.named_modules()}
    for index, layer in enumerate(network.layers):
        yield index, named[id(layer)], layer


def _check_module(peft: PeftConfig, path: Path, module: str, parts: Mapping[str, mx.array]) -> None:
    """Hold a module's arrays to each other and to the config."""
    wanted = {"lora_a", "lora_b"} | ({"m"} if peft.method == "dora" else set())
    if odd := sorted(wanted ^ parts.keys()):
        raise InputError(f"{path}: of {module} {odd[0]} is missing or unexpected (use_dora); fetch it again")
    a, b = parts["lora_a"], parts["lora_b"]
    if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == peft.rank(module):
        raise InputError(
            f"{path}: A and B of {module} are {a.shape} and {b.shape}, {CONFIG_FILE} says rank "
            f"{peft.rank(module)}"
        )
    if not peft.targets(module):
        raise InputError(f"{path}: {module} is none of target_modules in {CONFIG_FILE}; fetch both again")


def _check_widths(path: Path, weights: Mapping[str, mx.array], expected: Mapping[str, mx.array]) -> None:
    for name, array in sorted(weights.items()):
        if array.shape != expected[name].shape:
            module, _, part = name.rpartition(".")
            raise InputError(
                f"{path}: {part} of {module} is {array.shape}, the base takes {expected[name].shape}; give "
                "the adapter's own base model"
            )


def _fitted(parts: Mapping[str, mx.array], rank: int, factor: float) -> dict[str, mx.array]:
    """A as (inputs, rank), B as (rank, outputs) times `factor`, m as (outputs,)."""
    missing = rank - parts["lora_a"].shape[0]
    a, b = mx.transpose(parts["lora_a"]), mx.transpose(parts["lora_b"])
    if factor != 1:
        b = b.astype(mx.float32) * factor
    if missing:
        a, b = mx.pad(a, [(0, 0), (0, missing)]), mx.pad(b, [(0, missing), (0, 0)])
    return {"lora_a": a, "lora_b": b, **({"m": parts["m"]} if "m" in parts else {})}


def _filling(
    path: Path, peft: PeftConfig, expected: Mapping[str, mx.array], weights: Mapping[str, mx.array]
) -> dict[str, mx.array]:
    """Zeros for the modules that the adapter leaves out and mlx-lm's layout cannot."""
    lacking = {name: expected[name] for name in sorted(expected.keys() - weights.keys())}
    if lacking and peft.method == "dora":
        module = next(iter(lacking)).rpartition(".")[0]
        raise InputError(
            f"{path}: leaves out {module}, but mlx-lm's layout has the same modules in each of the last "
            "layers, and DoRA on it would be trained too; merge it into its base with PEFT"
        )
    return {name: mx.zeros(array.shape, mx.float32) for name, array in lacking.items()}


def _changes(
    peft: PeftConfig, modules: Mapping[str, object], rank: int, scale: float, filled: int
) -> list[str]:
    """What did not fit as it was: modules of other rank or scale, and arrays that were filled in."""
    smaller = sum(peft.rank(module) != rank for module in modules)
    moved = sum(peft.scale(module) != scale for module in modules)
    told = {
        f"of {len(modules)} modules {smaller} are of a smaller rank, filled up to {rank} with zeros": smaller,
        f"of {len(modules)} modules {moved} have another scale than {scale:g}, put into their B": moved,
        f"{filled // 2} modules that it leaves out are there as zeros": filled,
    }
    return [sentence for sentence, happened in told.items() if happened]


def _prompt(
    peft: PeftConfig,
    path: Path,
    tensors: Mapping[str, mx.array],
    network: nn.Module,
    base: Mapping[str, Any],
) -> Converted:
    check_prompt_family(base["model_type"])
    if set(tensors) != {PROMPT_TENSOR}:
        odd = sorted(set(tensors) ^ {PROMPT_TENSOR})[0]
        raise InputError(f"{path}: {odd} is missing or unexpected; a soft prompt is one tensor")
    prompt = tensors[PROMPT_TENSOR]
    count = peft.values.get("num_virtual_tokens")
    config = {"fine_tune_type": soft_prompt.KIND, "prompt_tokens": prompt.shape[0]}
    add_adapter(network, config, seed=0)
    [(name, expected)] = adapter_weights(network).items()
    if prompt.shape != expected.shape or prompt.shape[0] != count:
        raise InputError(
            f"{path}: the prompt is {prompt.shape}, {CONFIG_FILE} says {count} tokens and the base is "
            f"{expected.shape[1]} wide"
        )
    return Converted(config, {name: prompt}, [])
