"""What a quantised base does not allow, said before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import mlx.nn as nn

from tasks.config import DORA_BITS
from tasks.errors import InputError
from tasks.models.mlx_lm_import import import_mlx_lm


def check_base(method: str, config: Mapping[str, Any]) -> None:
    """Hold the base's `config.json` to what `method` can train.

    On CPU a base is dequantised when loaded, but its adapter has to fit the base as stored, in mlx-lm
    and on a GPU too: so the stored form counts.

    Raises:
        InputError: full training of a quantised base, or DoRA on one of 3, 5 or 6 bits.
    """
    stored = config.get("quantization") or config.get("quantization_config") or {}
    bits = {
        part["bits"] for part in (stored, *stored.values()) if isinstance(part, Mapping) and "bits" in part
    }
    _refuse(method, bits, quantised=bool(stored))


def check_modules(method: str, modules: Iterable[nn.Module]) -> None:
    """As `check_base`, of the modules in memory that are to be trained."""
    import_mlx_lm()
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    held = list(modules)
    if method == "dora" and any(isinstance(each, SwitchLinear | QuantizedSwitchLinear) for each in held):
        raise InputError(
            "train.method = 'dora': mlx_lm has none for layers of experts; leave them out of "
            "train.targets (attention), or use lora"
        )
    quantised = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
    bits = {each.bits for each in held if isinstance(each, quantised)}
    _refuse(method, bits, quantised=bool(bits))


def _refuse(method: str, bits: set[int], quantised: bool) -> None:
    if method == "full" and quantised:
        raise InputError(
            "train.method = 'full': quantised weights cannot be trained; use lora or dora, or a base "
            "that is not quantised (of a GGUF file model.dequantize=true makes one)"
        )
    # mlx_lm 0.32.2, tuner/dora.py:21, reckons the width with 32 // bits: 3, 5 and 6 do not divide 32.
    if method == "dora" and (odd := sorted(bits - set(DORA_BITS))):
        raise InputError(
            f"train.method = 'dora': mlx_lm cannot load it onto a base of {odd[0]} bits; use lora, or a base "
            f"of {', '.join(map(str, DORA_BITS))} bits"
        )
