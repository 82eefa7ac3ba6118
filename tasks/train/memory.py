"""A rough prediction of a training run's peak memory, from shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tasks.config import TrainSettings
from tasks.models.device import on_gpu
from tasks.models.folder import ModelFolder
from tasks.prepare.splits import load_splits
from tasks.publish import StepOutput
from tasks.train.trainable import count_trainable

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
    """Predict the peak of training `settings` on a batch of the longest, most supervised rows.

    Adapters count four times (value, gradient, two moments of Adam). An adapted layer keeps for its
    backward pass about ten arrays of the hidden width, five of the inner width and two of
    attention scores; a layer that is not adapted keeps none.
    """
    config = model.language_config()
    hidden, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads = config["num_attention_heads"]
    splits = load_splits(data.path)
    longest = max(int(splits[name].lengths.max()) for name in ("train", "valid"))
    supervised = max(int(splits[name].supervised_counts.max()) for name in ("train", "valid"))
    tokens = settings.batch_size * longest
    adapted = layers if settings.num_layers == -1 else min(settings.num_layers, layers)
    if settings.method == "soft-prompt":  # the gradient goes through all layers to the input
        adapted = layers
    a_layer = tokens * (10 * hidden + 5 * inner + 2 * heads * longest) * FLOAT_BYTES
    return MemoryEstimate(
        weights=weights_bytes(model.path, config),
        adapters=4 * count_trainable(model.config(), settings) * FLOAT_BYTES,
        activations=(adapted + 1) * a_layer,
        logits=LOGIT_COPIES * settings.batch_size * supervised * config["vocab_size"] * FLOAT_BYTES,
    )


def weights_bytes(folder: Path, config: dict[str, Any]) -> int:
    """Bytes of a model folder's weights once loaded: as stored on a GPU, all of it float32 on CPU."""
    files = list(folder.glob("*.safetensors"))
    if on_gpu():
        return sum(path.stat().st_size for path in files)
    group_size = config.get("quantization", {}).get("group_size", 64)
    numbers = 0
    for path in files:
        with safe_open(path, framework="numpy") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        for name, shape in shapes.items():
            module, _, leaf = name.rpartition(".")
            quantised = f"{module}.scales" in shapes
            if leaf == "scales":
                numbers += math.prod(shape) * group_size
            elif not (quantised and leaf in ("weight", "biases")):
                numbers += math.prod(shape)
    return numbers * FLOAT_BYTES


def free_memory() -> int:
    """Bytes a run may take: Metal's recommended working set on a Mac, available memory elsewhere."""
    import mlx.core as mx
    import psutil

    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return int(psutil.virtual_memory().available)
