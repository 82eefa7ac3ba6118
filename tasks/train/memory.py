"""A rough prediction of a training run's peak memory, from shapes alone."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tasks.config import TrainSettings
from tasks.models.folder import ModelFolder
from tasks.prepare.splits import load_splits
from tasks.publish import StepOutput

FLOAT_BYTES = 4
LOGIT_COPIES = 3
"""Logits in float32, their exponentials, and their gradient."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted bytes at the peak, by what takes them."""

    weights: int
    adapters: int
    activations: int
    logits: int

    @property
    def peak_bytes(self) -> int:
        """The sum."""
        return self.weights + self.adapters + self.activations + self.logits


def estimate_memory(settings: TrainSettings, model: ModelFolder, data: StepOutput) -> MemoryEstimate:
    """Predict the peak of training `settings` on a batch of the longest rows.

    Adapters count four times (value, gradient, two moments of Adam). An adapted layer keeps for its
    backward pass about ten arrays of the hidden width, five of the inner width and two of
    attention scores; a layer that is not adapted keeps none.
    """
    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    hidden, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads = config["num_attention_heads"]
    splits = load_splits(data.path)
    longest = max(int(splits[name].lengths.max()) for name in ("train", "valid"))
    tokens = settings.batch_size * longest
    adapted = layers if settings.num_layers == -1 else min(settings.num_layers, layers)
    a_layer = tokens * (10 * hidden + 5 * inner + 2 * heads * longest) * FLOAT_BYTES
    return MemoryEstimate(
        weights=sum(path.stat().st_size for path in model.path.glob("*.safetensors")),
        adapters=4 * adapted * _lora_parameters(config, settings.rank) * FLOAT_BYTES,
        activations=(adapted + 1) * a_layer,
        logits=LOGIT_COPIES * tokens * config["vocab_size"] * FLOAT_BYTES,
    )


def _lora_parameters(config: dict[str, int], rank: int) -> int:
    """Numbers in the LoRA matrices of one layer's seven linear modules."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    widths = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner)
    return rank * widths


def free_memory() -> int:
    """Bytes a run may take: Metal's recommended working set on a Mac, available memory elsewhere."""
    import mlx.core as mx
    import psutil

    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return int(psutil.virtual_memory().available)
