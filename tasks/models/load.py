"""A model folder in memory, with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import InputError
from tasks.models.device import on_gpu
from tasks.models.mlx_lm_import import import_mlx_lm
from tasks.models.safety import check_folder
from tasks.process import keep_freed_memory

if TYPE_CHECKING:
    from mlx.nn.layers.base import Module
    from mlx_lm.tokenizer_utils import TokenizerWrapper


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


def load_model(folder: Path) -> LoadedModel:
    """Load a model folder through mlx_lm, without ever running code of the model.

    On a GPU weights stay as stored. On CPU every parameter becomes float32 and quantised layers are
    dequantised: of its matrix products only float32 ones are fast.

    Args:
        folder: of `resolve_model`.

    Raises:
        InputError: the model needs code of its own, or mlx_lm does not know it.
    """
    check_folder(folder)
    import_mlx_lm()
    import mlx.core as mx
    from mlx_lm.utils import load_model as mlx_lm_load_model

    try:
        model, config = mlx_lm_load_model(folder, lazy=True, strict=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder}: mlx_lm cannot load this model: {error}") from None
    if not on_gpu():
        model, config = as_float32(model, config)
    use_fast_code(model)
    model.eval()
    mx.eval(model.parameters())
    tokenizer = _load_tokenizer(folder, config)
    return LoadedModel(model, tokenizer, config)


def use_fast_code(model: Module) -> None:
    """Exchange what this device's MLX is slow at, in this one model; what it computes stays the same."""
    import mlx.core as mx

    from tasks.models.cpu_functions import use_fast_functions
    from tasks.models.quantised_products import use_dequantised_products

    if not on_gpu():
        keep_freed_memory()
        use_fast_functions(model)
    elif mx.cuda.is_available():
        use_dequantised_products(model)


def _load_tokenizer(folder: Path, config: dict[str, Any]) -> TokenizerWrapper:
    from mlx_lm.utils import load_tokenizer

    read: Callable[..., TokenizerWrapper] = load_tokenizer
    try:
        return read(folder, {"trust_remote_code": False}, config.get("eos_token_id"))
    except (ValueError, OSError) as error:
        raise InputError(f"{folder}: transformers cannot load this tokenizer: {error}") from None


def as_float32(model: Module, config: dict[str, Any]) -> tuple[Module, dict[str, Any]]:
    """The model plain and in float32, nothing evaluated, and the config that describes it."""
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model

    # Scales first, so that weights are dequantised in float32 rather than in the scales' own type.
    model.set_dtype(mx.float32)
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    kept = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    return model, {**kept, "dtype": "float32"}
