"""From GGUF metadata to the config.json of the same model; what cannot be represented is refused."""

from __future__ import annotations

import math
from typing import Any

from tasks.errors import InputError
from tasks.models.gguf_check import GgufFile

# GGUF architecture: (model_type, transformers class). "llama" is Mistral's too: without sliding
# window attention they are the same network.
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
# Keys under the architecture's prefix that change the computation in ways the classes above have no
# setting for, with the value at which they change nothing.
WITHOUT_EQUIVALENT = {
    "expert_count": 0,
    "attention.scale": 0,
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "embedding_scale": 1,
    "residual_scale": 1,
    "logit_scale": 1,
    "use_parallel_residual": False,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
}
# The way back, by config.json's model_type.
GGUF_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# No size of a language model is larger; a damaged one may be.
LARGEST = 1 << 24
# Llama 3.1's and 3.2's own rope scaling; the factor itself is read from the tensor.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192


def model_config(gguf: GgufFile) -> dict[str, Any]:
    """The config.json of the model in a GGUF file, in Hugging Face's names, without dtype or quantisation.

    Raises:
        InputError: the architecture is not supported, or a setting has no equivalent, with the reason.
    """
    arch = architecture(gguf)
    _refuse_without_equivalent(gguf, arch)
    model_type, model_class = ARCHITECTURES[arch]
    hidden, heads = _whole(gguf, f"{arch}.embedding_length"), _whole(gguf, f"{arch}.attention.head_count")
    context = _whole(gguf, f"{arch}.context_length")
    config = {
        "architectures": [model_class],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": _whole(gguf, f"{arch}.feed_forward_length"),
        "num_hidden_layers": _layers(gguf, arch),
        "num_attention_heads": heads,
        "num_key_value_heads": _whole(gguf, f"{arch}.attention.head_count_kv", heads),
        "head_dim": _head_dim(gguf, arch, hidden, heads),
        "rms_norm_eps": gguf.need(f"{arch}.attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": context,
        "vocab_size": _vocab_size(gguf),
        "rope_theta": _rope_base(gguf, arch),
        "rope_scaling": _rope_scaling(gguf, arch),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "hidden_act": "silu",
        **special_ids(gguf),
    }
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in gguf.tensors
    return config


def architecture(gguf: GgufFile) -> str:
    """The GGUF architecture, if it is a supported one; else `InputError`."""
    arch = gguf.need("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise InputError(
            f"{gguf.path}: architecture '{arch}' cannot be imported from GGUF; supported are "
            f"{', '.join(ARCHITECTURES)} (Mistral is 'llama'). Give the model's hub name or folder instead"
        )
    return arch


def special_ids(gguf: GgufFile) -> dict[str, Any]:
    """`bos_token_id`, `pad_token_id` and `eos_token_id` (a list when several tokens end a turn)."""
    ends = (token_id(gguf, key) for key in ("eos", "eot", "eom"))
    ids = list(dict.fromkeys(end for end in ends if end is not None))
    found: dict[str, Any] = {
        "bos_token_id": token_id(gguf, "bos"),
        "pad_token_id": token_id(gguf, "padding"),
        "eos_token_id": (ids[0] if len(ids) == 1 else ids) if ids else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def token_id(gguf: GgufFile, key: str) -> int | None:
    """`tokenizer.ggml.<key>_token_id`, None when the file has none; `InputError` beyond the vocabulary."""
    index = gguf.maybe(f"tokenizer.ggml.{key}_token_id", int)
    count = len(gguf.need("tokenizer.ggml.tokens", list))
    if index is not None and not 0 <= index < count:
        raise InputError(
            f"{gguf.path}: tokenizer.ggml.{key}_token_id = {index} of {count} tokens; "
            "convert the model to GGUF again"
        )
    return index


def _refuse_without_equivalent(gguf: GgufFile, arch: str) -> None:
    context = gguf.need(f"{arch}.context_length", int)
    window = gguf.maybe(f"{arch}.attention.sliding_window", int) or 0
    faults = [
        f"{arch}.{key} = {gguf.metadata[f'{arch}.{key}']}"
        for key, neutral in WITHOUT_EQUIVALENT.items()
        if gguf.metadata.get(f"{arch}.{key}", neutral) != neutral
    ]
    if 0 < window < context:
        faults.append(f"{arch}.attention.sliding_window = {window}")
    if faults:
        raise InputError(
            f"{gguf.path}: {', '.join(faults)} has no equivalent in a GGUF import of '{arch}'; "
            "give the model's hub name or folder instead"
        )


def _whole(gguf: GgufFile, key: str, default: int | None = None) -> int:
    value = gguf.maybe(key, int)
    value = default if value is None else value
    if value is None:
        raise InputError(f"{gguf.path}: has no metadata '{key}'; convert the model to GGUF again")
    if not 1 <= value <= LARGEST:
        raise InputError(f"{gguf.path}: {key} = {value}, expected 1 to {LARGEST:,}; fetch the file again")
    return value


def _layers(gguf: GgufFile, arch: str) -> int:
    layers = _whole(gguf, f"{arch}.block_count")
    found = {name.split(".")[1] for name in gguf.tensors if name.startswith("blk.")}
    if len(found) != layers:
        raise InputError(
            f"{gguf.path}: {arch}.block_count = {layers}, but the file has tensors of {len(found)} blocks; "
            "for a model split over several files, merge them first with llama-gguf-split"
        )
    return layers


def _rope_base(gguf: GgufFile, arch: str) -> float:
    # llama.cpp's default where the file is silent.
    return gguf.maybe(f"{arch}.rope.freq_base", float) or 10000.0


def _head_dim(gguf: GgufFile, arch: str, hidden: int, heads: int) -> int:
    rotated = gguf.maybe(f"{arch}.rope.dimension_count", int)
    head_dim = _whole(gguf, f"{arch}.attention.key_length", rotated or hidden // heads)
    value_length = _whole(gguf, f"{arch}.attention.value_length", head_dim)
    faults = []
    if rotated not in (None, head_dim):
        faults.append(f"rotates {rotated} of {head_dim} dimensions of a head")
    if value_length != head_dim:
        faults.append(f"has keys of {head_dim} and values of {value_length} dimensions")
    if arch == "qwen2" and head_dim * heads != hidden:
        faults.append(f"has {heads} heads of {head_dim} dimensions over a hidden size of {hidden}")
    if faults:
        raise InputError(
            f"{gguf.path}: the model {' and '.join(faults)}, which mlx_lm's {arch} cannot represent; "
            "give the model's hub name or folder instead"
        )
    return head_dim


def _vocab_size(gguf: GgufFile) -> int:
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{gguf.path}: has no table token_embd.weight; convert the model to GGUF again")
    return int(embedding.shape[1])


def _rope_scaling(gguf: GgufFile, arch: str) -> dict[str, Any] | None:
    older = gguf.maybe(f"{arch}.rope.scale_linear", float)
    kind = gguf.maybe(f"{arch}.rope.scaling.type", str) or ("linear" if older else "none")
    factor = gguf.maybe(f"{arch}.rope.scaling.factor", float) or older or 1.0
    if "rope_freqs.weight" in gguf.tensors:
        if kind != "none":
            raise InputError(f"{gguf.path}: has both rope_freqs.weight and {arch}.rope.scaling.type = {kind}")
        return _llama3_scaling(gguf, arch)
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": factor}
    if kind == "yarn":
        original = _whole(gguf, f"{arch}.rope.scaling.original_context_length")
        return {
            "rope_type": "yarn",
            "type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    raise InputError(
        f"{gguf.path}: {arch}.rope.scaling.type = '{kind}' cannot be imported from GGUF; supported are "
        "none, linear, yarn and llama3's rope_freqs. Give the model's hub name or folder instead"
    )


def _llama3_scaling(gguf: GgufFile, arch: str) -> dict[str, Any] | None:
    import numpy as np

    factors = np.asarray(gguf.tensors["rope_freqs.weight"].data, dtype=np.float64).ravel()
    factor = float(factors.max())
    if np.all(factors == 1):
        return None
    base = _rope_base(gguf, arch)
    expected = llama3_factors(len(factors) * 2, base, factor)
    if not np.allclose(factors, expected, rtol=1e-4):
        raise InputError(
            f"{gguf.path}: rope_freqs.weight does not follow Llama 3's rule (factor {factor:g}, low "
            f"{LLAMA3_LOW:g}, high {LLAMA3_HIGH:g}, context {LLAMA3_CONTEXT}), which is all that config.json "
            "can say; give the model's hub name or folder instead"
        )
    return {
        "rope_type": "llama3",
        "type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }


def llama3_factors(head_dim: int, base: float, factor: float) -> list[float]:
    """What each of the head_dim / 2 rotary wavelengths is stretched by (Llama 3.1's rule).

    Short waves stay, long ones are stretched by `factor`, those between by a smooth blend.
    """
    factors = []
    for dimension in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (dimension / head_dim)
        share = (LLAMA3_CONTEXT / wavelength - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
        share = min(1.0, max(0.0, share))
        factors.append(1 / ((1 - share) / factor + share))
    return factors
