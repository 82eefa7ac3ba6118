"""Weights as GGUF tensors: names, row order and number format, by the tables of the import."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from tasks.errors import InputError
from tasks.models.gguf_weights import gguf_name, in_gguf_row_order

if TYPE_CHECKING:
    import mlx.core as mx
    from gguf import GGMLQuantizationType

Kind = Literal["f32", "f16", "bf16", "q8_0"]

LARGEST_F16 = 65504.0
BLOCK = 32
"""Numbers that share a scale in q8_0."""


def tensor_kind(name: str, shape: tuple[int, ...], kind: Kind) -> GGMLQuantizationType:
    """How a tensor is stored in a file of `kind`, as llama.cpp's own converter does it.

    Vectors are float32; matrices whose rows are no whole blocks are float16 in a q8_0 file.
    """
    from gguf import GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[kind.upper()]


def stored_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """The size of a tensor in the file."""
    from gguf import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * block_bytes


def as_gguf(name: str, weight: mx.array, kind: GGMLQuantizationType, args: Any) -> npt.NDArray[Any]:
    """A parameter of mlx_lm's model as GGUF stores it.

    Args:
        name: mlx_lm's.
        args: of the model in mlx_lm; the numbers of heads are read.

    Raises:
        InputError: a number is too large for float16.
    """
    import gguf

    values = in_row_order(name, as_float32(weight), args)
    if kind == gguf.GGMLQuantizationType.F16 and (largest := float(np.abs(values).max())) > LARGEST_F16:
        raise InputError(
            f"{name} holds {largest:.3g}, beyond float16's {LARGEST_F16:g}; export with --type bf16 or f32"
        )
    return np.ascontiguousarray(gguf.quants.quantize(np.ascontiguousarray(values), kind))


def in_row_order(name: str, rows: npt.NDArray[np.float32], args: Any) -> npt.NDArray[np.float32]:
    """Rows of Llama's q and k in GGUF's order; all others as they are."""
    part = re.search(r"self_attn\.([qk])_proj\.", name)
    if args.model_type not in ("llama", "mistral") or not part:
        return rows
    return in_gguf_row_order(rows, args.num_attention_heads if part[1] == "q" else args.num_key_value_heads)


def as_float32(array: mx.array) -> npt.NDArray[np.float32]:
    """An array of MLX in numpy, which knows no bfloat16."""
    import mlx.core as mx

    return np.array(array.astype(mx.float32))


def placed(names: list[str]) -> dict[str, str]:
    """GGUF's name of every parameter; `InputError` for those it has no name for."""
    found = {name: gguf_name(name) for name in names}
    if strangers := [name for name, known in found.items() if known is None]:
        raise InputError(
            f"GGUF has no place for {', '.join(strangers[:5])}; use the fused model with mlx-lm, or export "
            "it in the Hugging Face layout"
        )
    return {name: known for name, known in found.items() if known is not None}
