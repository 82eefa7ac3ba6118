"""A model folder in memory, with its tokenizer and, if given, an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tasks.errors import InputError
from tasks.models.device import on_gpu
from tasks.models.mlx_lm_import import import_mlx_lm
from tasks.models.safety import check_safetensors, read_config, refuse_custom_code

if TYPE_CHECKING:
    from mlx.nn.layers.base import Module
    from mlx_lm.tokenizer_utils import TokenizerWrapper

ADAPTER_LEAVES = {"lora_a", "lora_b", "m"}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: mlx_lm's model; called with ids (batch, length) it gives logits (batch, length, vocabulary).
        tokenizer: mlx_lm's wrapper of the Hugging Face tokenizer.
        config: describes the model as it is in memory: on CPU without "quantization".
    """

    model: Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]


def load_model(folder: Path, adapter: Path | None = None) -> LoadedModel:
    """Load a model folder through mlx_lm, without ever running code of the model.

    On a GPU weights stay as stored. On CPU every parameter becomes float32 and quantised layers are
    dequantised: of its matrix products only float32 ones are fast.

    Args:
        folder: of `resolve_model`.
        adapter: a folder with mlx-lm's adapters.safetensors and adapter_config.json.

    Raises:
        InputError: the model needs code of its own, mlx_lm does not know it, or the adapter does not fit.
    """
    refuse_custom_code(folder, read_config(folder))
    import_mlx_lm()
    import mlx.core as mx
    from mlx_lm.utils import load_model as mlx_lm_load_model
    from mlx_lm.utils import load_tokenizer

    try:
        model, config = mlx_lm_load_model(folder, lazy=True, strict=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder}: mlx_lm cannot load this model: {error}") from None
    if not on_gpu():
        model, config = _as_float32(model, config)
    if adapter is not None:
        _add_adapter(model, adapter)
    model.eval()
    mx.eval(model.parameters())
    read_tokenizer: Callable[..., TokenizerWrapper] = load_tokenizer
    tokenizer = read_tokenizer(folder, {"trust_remote_code": False}, config.get("eos_token_id"))
    return LoadedModel(model, tokenizer, config)


def _as_float32(model: Module, config: dict[str, Any]) -> tuple[Module, dict[str, Any]]:
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model

    # Scales first, so that weights are dequantised in float32 rather than in the scales' own type.
    model.set_dtype(mx.float32)
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    kept = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    return model, {**kept, "dtype": "float32"}


def _add_adapter(model: Any, adapter: Path) -> None:
    """Lay an adapter over the model; one that fits only in part is refused, which mlx_lm does not do."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_adapters

    weights_file = adapter / "adapters.safetensors"
    kind = _adapter_kind(adapter)
    if kind not in ("lora", "dora"):
        raise InputError(
            f"{adapter}: fine_tune_type = '{kind}'; only 'lora' and 'dora' adapters can be loaded"
        )
    check_safetensors(weights_file)
    try:
        load_adapters(model, str(adapter))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{adapter}: the adapter does not fit this model: {error}") from None
    given = cast("dict[str, mx.array]", mx.load(str(weights_file)))
    parameters = cast("dict[str, mx.array]", tree_flatten(model.parameters(), destination={}))
    wanted = {name for name in parameters if name.rsplit(".", 1)[-1] in ADAPTER_LEAVES}
    if missing := sorted(wanted - given.keys()):
        raise InputError(f"{weights_file}: lacks {len(missing)} tensors its config names, first {missing[0]}")
    for name, value in given.items():
        if not mx.isfinite(value).all().item():
            raise InputError(f"{weights_file}: {name} holds infinities or NaN; train again or use another")


def _adapter_kind(adapter: Path) -> str:
    for name in ("adapter_config.json", "adapters.safetensors"):
        if not (adapter / name).is_file():
            raise InputError(f"{adapter}: has no {name}; give an adapter folder as mlx_lm writes it")
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{adapter}/adapter_config.json: not JSON ({error})") from None
    return str(config.get("fine_tune_type", "lora"))
