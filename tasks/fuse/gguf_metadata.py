"""What a GGUF file says of a model beside its weights: sizes, rotary positions, number format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.errors import InputError
from tasks.fuse.gguf_weights import Kind
from tasks.models.gguf_config import (
    GGUF_ARCHITECTURES,
    LLAMA3_CONTEXT,
    LLAMA3_HIGH,
    LLAMA3_LOW,
    llama3_factors,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter

YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0}
"""Of mlx_lm's YaRN and of llama.cpp's; GGUF has no key for other values that both would read."""

ROPE_FREQS = "rope_freqs.weight"


def gguf_architecture(model_type: str) -> str:
    """GGUF's name of the architecture; `InputError` for one that is not exported."""
    if model_type not in GGUF_ARCHITECTURES:
        raise InputError(
            f"model_type '{model_type}' cannot be exported to GGUF; supported are "
            f"{', '.join(GGUF_ARCHITECTURES)}. Use the fused model with mlx-lm"
        )
    return GGUF_ARCHITECTURES[model_type]


def head_dim(args: Any) -> int:
    """Dimensions of an attention head, of a model's arguments in mlx_lm."""
    return int(getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads)


def add_metadata(writer: GGUFWriter, args: Any, context_length: int | None, name: str, kind: Kind) -> None:
    """Write sizes, rotary positions and number format.

    Args:
        args: of the model in mlx_lm: what is computed, whatever else config.json says.
        context_length: tokens; `max_position_embeddings`.

    Raises:
        InputError: GGUF cannot say what this model computes.
    """
    from gguf import LlamaFileType

    _refuse_without_equivalent(args, context_length)
    size = head_dim(args)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantization_version(2)
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(LlamaFileType[types[kind]])
    writer.add_vocab_size(args.vocab_size)
    writer.add_context_length(context_length or 0)
    writer.add_embedding_length(args.hidden_size)
    writer.add_block_count(args.num_hidden_layers)
    writer.add_feed_forward_length(args.intermediate_size)
    writer.add_head_count(args.num_attention_heads)
    writer.add_head_count_kv(args.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(args.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(args.rope_theta)
    _add_rope_scaling(writer, args)


def rope_factors(args: Any) -> np.ndarray[tuple[int], np.dtype[np.float32]] | None:
    """What Llama 3's rule stretches each of the head_dim / 2 wavelengths by; None for another rule."""
    scaling = _scaling(args)
    if _rope_type(scaling) != "llama3":
        return None
    factors = llama3_factors(head_dim(args), args.rope_theta, scaling["factor"])
    return np.array(factors, dtype=np.float32)


def _refuse_without_equivalent(args: Any, context_length: int | None) -> None:
    faults = []
    if getattr(args, "rope_traditional", False):
        faults.append("rope_traditional")
    if "sliding_attention" in (getattr(args, "layer_types", None) or []):
        faults.append("sliding window attention")
    if not context_length:
        faults.append("no max_position_embeddings, the length of its context,")
    scaling = _scaling(args)
    kind = _rope_type(scaling)
    if kind == "llama3" and not _is_llama3s_own(scaling):
        faults.append(f"rope_scaling {scaling}, other than Llama 3's low, high and context,")
    elif kind == "yarn" and any(scaling.get(key, value) != value for key, value in YARN_DEFAULTS.items()):
        faults.append(f"rope_scaling {scaling}, YaRN with values of its own,")
    elif kind not in ("default", "linear", "yarn", "llama3"):
        faults.append(f"rope_scaling of type '{kind}'")
    if faults:
        raise InputError(
            f"a model with {' and '.join(faults)} cannot be exported to GGUF; use it with mlx-lm"
        )


def _is_llama3s_own(scaling: dict[str, Any]) -> bool:
    own = {
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }
    return all(scaling.get(key, value) == value for key, value in own.items())


def _add_rope_scaling(writer: GGUFWriter, args: Any) -> None:
    """Linear and YaRN as metadata; Llama 3's rule is the tensor `rope_freqs.weight`."""
    from gguf import RopeScalingType

    scaling = _scaling(args)
    kind = _rope_type(scaling)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        # mlx_lm's default where the config is silent.
        writer.add_rope_scaling_orig_ctx_len(scaling.get("original_max_position_embeddings", 4096))


def _scaling(args: Any) -> dict[str, Any]:
    return getattr(args, "rope_scaling", None) or {}


def _rope_type(scaling: dict[str, Any]) -> str:
    """As mlx_lm's `initialize_rope` (0.32.2) reads it."""
    return str(scaling.get("type") or scaling.get("rope_type") or "default")
