"""GGUF tensors as MLX weights: names, row order, and blocks repacked or dequantised.

Names and row order are told in both directions: `tasks/fuse` writes GGUF by the same tables.

Q4_0, Q4_1 and Q8_0 blocks are exactly MLX's affine quantisation with groups of 32: `w = scale * q + bias`
with float16 scales. They are repacked here, tensor by tensor from the mapped file, so that an import
needs the memory of one shard and nothing of the file is read by MLX's own GGUF reader, which turns
every other quantised type into float16 and has open out-of-bounds reports.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from tasks.errors import InputError
from tasks.models.gguf_check import GgufFile

if TYPE_CHECKING:
    import mlx.core as mx
    from gguf import ReaderTensor

Precision = Literal["float32", "stored"]
Bytes = npt.NDArray[np.uint8]

GROUP_SIZE = 32
# Bits of the types that MLX's affine form holds exactly.
AFFINE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Held by config.json instead (`gguf_config`).
IN_CONFIG = {"rope_freqs.weight"}


def weight_names(gguf: GgufFile) -> dict[str, str]:
    """MLX's name of every weight, by GGUF name; `InputError` for a tensor that has no place."""
    names = {name: _mlx_name(name) for name in gguf.tensors if name not in IN_CONFIG}
    strangers = [name for name, known in names.items() if known is None]
    if strangers:
        raise InputError(
            f"{gguf.path}: tensors without a place in the model: {', '.join(strangers[:5])}; "
            "give the model's hub name or folder instead"
        )
    return {name: known for name, known in names.items() if known is not None}


def dense_dtype(gguf: GgufFile, precision: Precision) -> str:
    """The dtype of weights that are not quantised.

    float32 for precision "float32". Else float16, in which the scales of quantised blocks are stored,
    except for files of nothing but F32 and BF16, whose range float16 may not hold: bfloat16.
    """
    if precision == "float32":
        return "float32"
    kinds = {tensor.tensor_type.name for tensor in gguf.tensors.values()}
    return "bfloat16" if kinds <= {"F32", "BF16"} else "float16"


def quantization(gguf: GgufFile, precision: Precision) -> dict[str, Any] | None:
    """config.json's "quantization": the commonest bits, and an entry for each layer that differs.

    None when no weight stays quantised.
    """
    names = weight_names(gguf)
    bits = {
        names[name].removesuffix(".weight"): _affine_bits(tensor, precision)
        for name, tensor in gguf.tensors.items()
        if name in names and len(tensor.shape) == 2
    }
    kept = [value for value in bits.values() if value]
    if not kept:
        return None
    usual = max(sorted(set(kept)), key=kept.count)
    layer = {"group_size": GROUP_SIZE, "mode": "affine"}
    others = {name: {**layer, "bits": b} if b else False for name, b in bits.items() if b != usual}
    return {**layer, "bits": usual, **others}


def mlx_weights(
    gguf: GgufFile, name: str, config: Mapping[str, Any], precision: Precision
) -> dict[str, mx.array]:
    """One GGUF tensor as MLX parameters: `weight`, and `scales` and `biases` where it stays quantised.

    Args:
        name: the tensor's name in the file.
        config: of `gguf_config.model_config`.
        precision: "float32" dequantises; "stored" keeps Q4_0, Q4_1 and Q8_0 as they are.

    Raises:
        InputError: the tensor holds infinities or NaN, or has a type that cannot be read.
    """
    import mlx.core as mx

    tensor, target = gguf.tensors[name], _mlx_name(name)
    if target is None:
        raise InputError(f"{gguf.path}: tensor {name} has no place in the model")
    data = _in_mlx_row_order(tensor.data, name, config)  # (rows, bytes), (rows, columns) or (columns,)
    if _affine_bits(tensor, precision):
        packed, scales, biases = affine_from_blocks(data, tensor.tensor_type.name)
        _refuse_not_finite(gguf, name, scales, biases)
        layer = target.removesuffix(".weight")
        return {
            f"{layer}.weight": mx.array(packed),
            f"{layer}.scales": mx.array(scales),
            f"{layer}.biases": mx.array(biases),
        }
    values = _dequantised(gguf, tensor, data)
    weight = mx.array(values).astype(getattr(mx, dense_dtype(gguf, precision)))
    _refuse_not_finite(gguf, name, np.asarray(mx.max(mx.abs(weight)).astype(mx.float32)))
    return {target: weight}


def affine_from_blocks(
    data: Bytes, kind: str
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """GGUF blocks of 32 as MLX's affine form, exactly.

    Args:
        data: (rows, bytes), whole blocks.
        kind: Q4_0 (`d * (q - 8)`), Q4_1 (`d * q + m`) or Q8_0 (`d * q`, q signed).

    Returns:
        packed (rows, columns * bits / 32), scales and biases (rows, columns / 32).
    """
    rows = data.shape[0]
    header, block_bytes = {"Q4_0": (2, 18), "Q4_1": (4, 20), "Q8_0": (2, 34)}[kind]
    blocks = np.ascontiguousarray(data).reshape(rows, -1, block_bytes)
    numbers = np.ascontiguousarray(blocks[..., :header]).view("<f2")  # (rows, groups, 1 or 2)
    scales, quants = numbers[..., 0], blocks[..., header:]
    if kind == "Q8_0":
        # Signed to unsigned: q + 128, undone by the bias.
        packed, biases = quants ^ np.uint8(0x80), scales * np.float16(-128)
    else:
        # A block's first 16 values are the low nibbles, the last 16 the high ones.
        values = np.concatenate([quants & 0x0F, quants >> 4], axis=-1)
        packed = values[..., ::2] | values[..., 1::2] << 4
        biases = numbers[..., 1] if kind == "Q4_1" else scales * np.float16(-8)
    words = np.ascontiguousarray(packed).view("<u4").reshape(rows, -1)
    return words, np.ascontiguousarray(scales), np.ascontiguousarray(biases)


def gguf_name(name: str) -> str | None:
    """The GGUF name, `blk.0.attn_q.weight`, of a parameter of mlx_lm's model; None when it has no place."""
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        layer, module, kind = match.groups()
        part = _inverse(BLOCK_NAMES).get(module)
        return f"blk.{layer}.{part}.{kind}" if part else None
    module, _, kind = name.rpartition(".")
    part = _inverse(TOP_NAMES).get(module)
    return f"{part}.weight" if part and kind == "weight" else None


def in_gguf_row_order(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of Llama's q or k, (heads * head_dim, …), as GGUF has them: halves (i, i + d/2) become pairs."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {known: part for part, known in names.items()}


def _mlx_name(name: str) -> str | None:
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        return f"model.layers.{int(layer)}.{BLOCK_NAMES[part]}.{kind}" if part in BLOCK_NAMES else None
    part, _, kind = name.partition(".")
    return f"{TOP_NAMES[part]}.weight" if part in TOP_NAMES and kind == "weight" else None


def _affine_bits(tensor: ReaderTensor, precision: Precision) -> int | None:
    if precision == "float32" or len(tensor.shape) != 2:
        return None
    return AFFINE_BITS.get(tensor.tensor_type.name)


def _in_mlx_row_order(data: npt.NDArray[Any], name: str, config: Mapping[str, Any]) -> npt.NDArray[Any]:
    """Undo the order GGUF gives the q and k rows of Llama: pairs (2i, 2i+1) become halves (i, i + d/2).

    llama.cpp rotates neighbouring rows for this family, mlx_lm (as Hugging Face) the two halves of a
    head. Whole rows move, so it is the same for every type, and for a bias.
    """
    part = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)
    if config["model_type"] != "llama" or not part:
        return data
    heads = config["num_attention_heads" if part.group(1) == "q" else "num_key_value_heads"]
    rows = np.arange(data.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return data[rows]


def _dequantised(gguf: GgufFile, tensor: ReaderTensor, data: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    from gguf import dequantize

    try:
        return np.asarray(dequantize(data, tensor.tensor_type), dtype=np.float32)
    except NotImplementedError:
        raise InputError(
            f"{gguf.path}: tensor {tensor.name} has the type {tensor.tensor_type.name}, which cannot be "
            "read; use a file of another quantisation, such as Q8_0 or Q4_K_M"
        ) from None


def _refuse_not_finite(gguf: GgufFile, name: str, *values: npt.NDArray[Any]) -> None:
    if not all(np.isfinite(value).all() for value in values):
        raise InputError(f"{gguf.path}: tensor {name} holds infinities or NaN; fetch the file again")
