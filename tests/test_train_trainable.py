"""Trainable parameters are counted from a config alone, without the memory of the model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from conftest import FAMILIES, TINY_LLAMA, tiny_network

from tasks.config import TrainSettings
from tasks.errors import InputError
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, count_parameters
from tasks.train.targets import target_keys
from tasks.train.trainable import count_trainable

TINYLLAMA_1B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
LLAMA_31_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
FOUR_BIT = {"quantization": {"bits": 4, "group_size": 64}}


def settings_of(**changes: object) -> TrainSettings:
    return TrainSettings.model_validate(changes)


@pytest.mark.parametrize("stored", [{}, FOUR_BIT], ids=["plain", "quantised"])
@pytest.mark.parametrize(
    ("config", "changes", "millions"),
    [
        (TINYLLAMA_1B, {"num_layers": 16, "rank": 8, "targets": ["q_proj", "v_proj"]}, 0.8192),
        (LLAMA_31_8B, {"num_layers": -1, "rank": 16}, 41.943040),
    ],
    ids=["tinyllama", "llama-8b"],
)
def test_published_counts_are_met_in_next_to_no_memory(
    config: dict[str, Any], changes: dict[str, object], millions: float, stored: dict[str, Any]
) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert count_trainable(config | stored, settings_of(**changes)) == millions * 1e6
    assert mx.get_peak_memory() - before < 1e6


def test_full_training_of_everything_is_every_parameter() -> None:
    assert count_trainable(LLAMA_31_8B, settings_of(method="full", num_layers=-1)) == 8_030_261_248
    with pytest.raises(InputError, match="quantised weights cannot be trained"):
        count_trainable(LLAMA_31_8B | FOUR_BIT, settings_of(method="full"))


def test_a_soft_prompt_is_its_tokens_times_the_width() -> None:
    assert count_trainable(LLAMA_31_8B, settings_of(method="soft-prompt", prompt_tokens=20)) == 20 * 4096


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "quantised"])
@pytest.mark.parametrize("method", ["lora", "dora", "soft-prompt"])
@pytest.mark.parametrize("kind", list(FAMILIES))
def test_the_count_is_that_of_the_adapter_put_on(kind: str, method: str, bits: int | None) -> None:
    settings = settings_of(method=method, num_layers=3, rank=4, targets=["mlp", "q_proj"])
    network = tiny_network(kind, bits)
    keys = target_keys(network, settings.targets, settings.num_layers)
    add_adapter(network, adapter_config(settings, 4, keys), 0)
    stored = {"quantization": {"bits": bits, "group_size": 32}} if bits else {}
    counted = count_trainable(TINY_LLAMA | FAMILIES[kind] | stored, settings)
    assert counted == count_parameters(adapter_weights(network))
