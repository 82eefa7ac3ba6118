"""The shapes of models that people ask about, each from the config.json of the repository named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
    "rope_theta": 500000.0,
}


def _llama(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = False
) -> dict[str, Any]:
    return {
        **LLAMA,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


KNOWN_MODELS: Mapping[str, dict[str, Any]] = {
    "1B": _llama(2048, 8192, 16, 32, 8, 128256, tied=True),  # meta-llama/Llama-3.2-1B
    "3B": _llama(3072, 8192, 28, 24, 8, 128256, tied=True),  # meta-llama/Llama-3.2-3B
    "7B": _llama(4096, 11008, 32, 32, 32, 32000),  # meta-llama/Llama-2-7b-hf
    "13B": _llama(5120, 13824, 40, 40, 40, 32000),  # meta-llama/Llama-2-13b-hf
    "33B": _llama(
        6656, 17920, 60, 52, 52, 32000
    ),  # LLaMA 33B (Touvron et al. 2023, arXiv:2302.13971, table 2)
    "70B": _llama(8192, 28672, 80, 64, 8, 32000),  # meta-llama/Llama-2-70b-hf
}


def shallow(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The same with fewer layers."""
    return {**config, "num_hidden_layers": layers}
