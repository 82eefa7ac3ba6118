"""Tiny random networks of mlx-lm's architectures."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tasks.models.mlx_lm_import import import_mlx_lm

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-sliding": {
        "model_type": "llama",
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen2": {},
    "qwen3": {},
    "gemma2": {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "cohere2": {
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.25,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "rwkv7": {
        "norm_eps": 1e-5,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
        "layer_norm_epsilon": 1e-5,
    },
}


def tiny_network(kind: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A random network of a kind of `CONFIGS`, in evaluation mode, no parameter at its default."""
    import_mlx_lm()
    from mlx_lm.utils import _get_classes

    config = {**COMMON, "model_type": kind, **CONFIGS[kind], **changes}
    model_class, arguments_class = _get_classes(config)
    mx.random.seed(seed)
    network: nn.Module = model_class(arguments_class.from_dict(config))
    network.update(
        nn.utils.tree_map(lambda array: array + mx.random.normal(array.shape) * 0.1, network.parameters())
    )
    network.eval()
    mx.eval(network.parameters())
    return network
