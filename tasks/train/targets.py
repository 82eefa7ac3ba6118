"""Which modules of a layer are adapted: names and groups of names, found in the model itself."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.nn as nn

from tasks.errors import InputError
from tasks.models.mlx_lm_import import import_mlx_lm

ALL_LINEAR = "all-linear"

GROUPS = {
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "moe", "experts"),
}
"""A module belongs to a group when the name of one that holds it has one of these in it."""


def target_keys(model: nn.Module, targets: Sequence[str], num_layers: int = -1) -> list[str]:
    """Paths within a layer, as `self_attn.q_proj`, of the modules that `targets` name: mlx-lm's `keys`.

    Args:
        model: of mlx-lm, as loaded, without an adapter.
        targets: names as q_proj, paths as self_attn.q_proj, or attention, mlp, all-linear.
        num_layers: looked for in the last N layers, -1 for all: those of a hybrid model differ.

    Raises:
        InputError: a target is none of the model's; the message lists those that are.
    """
    layers = model.layers if num_layers == -1 else model.layers[-num_layers:]
    paths = sorted({path for layer in layers for path, module in layer.named_modules() if adaptable(module)})
    chosen: set[str] = set()
    for target in targets:
        found = [path for path in paths if _is_named(path, target)]
        if not found:
            names = sorted({path.rpartition(".")[2] for path in paths})
            raise InputError(
                f"train.targets: the model has no '{target}' in the layers adapted; "
                f"give {', '.join(names)}, or the groups {', '.join(GROUPS)}, {ALL_LINEAR}"
            )
        chosen.update(found)
    return sorted(chosen)


def adaptable(module: nn.Module) -> bool:
    """Whether mlx-lm can wrap the module in LoRA: linear layers, plain, quantised or of experts."""
    import_mlx_lm()
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    linear = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    return isinstance(module, linear) or hasattr(module, "to_lora")


def _is_named(path: str, target: str) -> bool:
    *holders, name = path.split(".")
    if target in GROUPS:
        return any(marker in holder for holder in holders for marker in GROUPS[target])
    return target in (ALL_LINEAR, name, path)
