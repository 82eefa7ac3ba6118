"""The base models that training steps are compared on: the bundled one, and random weights of real shapes.

A shape is all that a step's time depends on, so random weights serve, and nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tasks.models.device import on_gpu

BUNDLED = "135m"

LLAMA: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5, "attention_bias": False}

LLAMA_3: dict[str, Any] = {
    **LLAMA,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {  # for tests of the benchmark itself
        **LLAMA,
        "hidden_size": 64,
        "num_hidden_layers": 10,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
    },
    "smollm2-360m": {  # config.json of HuggingFaceTB/SmolLM2-360M-Instruct
        **LLAMA,
        "hidden_size": 960,
        "num_hidden_layers": 32,
        "intermediate_size": 2560,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
    },
    "tinyllama-1.1b": {  # config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0
        **LLAMA,
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
    },
    "llama-3.2-1b": {  # config.json of meta-llama/Llama-3.2-1B
        **LLAMA_3,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "llama-3.2-3b": {  # config.json of meta-llama/Llama-3.2-3B
        **LLAMA_3,
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}

NOT_TIMED = ("tiny", "smollm2-360m")
MODELS = (BUNDLED, *(name for name in SHAPES if name not in NOT_TIMED))
METHODS = ("lora", "qlora")
BITS, GROUP_SIZE = 4, 64


@dataclass(frozen=True)
class Base:
    """A base model for one side or both, never changed itself: `copy` gives what is trained.

    Attributes:
        config: as in `config.json`, "quantization" included.
        weights: by name, as mlx-lm keeps them.
    """

    config: dict[str, Any]
    weights: dict[str, mx.array]

    @property
    def layers(self) -> int:
        """Transformer layers."""
        return int(self.config["num_hidden_layers"])

    def copy(self) -> nn.Module:
        """A model of its own over the same arrays, in evaluation mode."""
        network = _skeleton(self.config)
        network.load_weights(list(self.weights.items()))
        network.eval()
        return network


def make_base(name: str, method: str) -> Base:
    """A base as mlx-lm would hold it in memory: 4 bits for qlora, else 16 on a GPU and 32 on CPU.

    Made an array at a time, so that no more than one of them is ever in float32 beside.
    """
    network, config = _bundled() if name == BUNDLED else _random(SHAPES[name])
    network.set_dtype(dtype_of_products())
    if method == "qlora":
        config = {**config, "quantization": {"bits": BITS, "group_size": GROUP_SIZE}}
        nn.quantize(network, GROUP_SIZE, BITS)
    base = Base(config, dict(tree_flatten(network.parameters())))
    for array in base.weights.values():
        mx.eval(array)
    return base


def as_ours(base: Base) -> Base:
    """The base as Tunesmith holds it: on CPU, where quantised products are slow, as float32."""
    if on_gpu() or "quantization" not in base.config:
        return base
    from mlx_lm.utils import dequantize_model

    network = base.copy()
    network.set_dtype(mx.float32)  # scales first: weights are dequantised in their type
    config = {key: value for key, value in base.config.items() if key != "quantization"}
    base = Base(config, dict(tree_flatten(dequantize_model(network).parameters())))
    mx.eval(base.weights)
    return base


def config_of(name: str) -> dict[str, Any]:
    """The config of a model, without its weights."""
    if name in SHAPES:
        return SHAPES[name]
    from tasks.config import ModelSettings
    from tasks.models.resolve import resolve_model

    return resolve_model(ModelSettings()).config()


def head_over_body(config: dict[str, Any]) -> float:
    """h: operations of the vocabulary projection over those of all layers, per position.

    Of matrix products with weights only: attention's own, and everything that is not a product, is left out.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * width * (heads + config["num_key_value_heads"])  # q and o, k and v
    feed_forward = 3 * hidden * config["intermediate_size"]
    body = config["num_hidden_layers"] * (attention + feed_forward)
    return float(hidden * config["vocab_size"] / body)


def dtype_of_products() -> mx.Dtype:
    """What a base that is not quantised is held in: bfloat16 on a GPU; on CPU only float32 is fast."""
    return mx.bfloat16 if on_gpu() else mx.float32


def _bundled() -> tuple[nn.Module, dict[str, Any]]:
    from mlx_lm.utils import load_model

    from tasks.config import ModelSettings
    from tasks.models.resolve import resolve_model

    network, config = load_model(resolve_model(ModelSettings()).path, lazy=True)
    return network, config


def _random(config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    mx.random.seed(0)
    return _skeleton(config), config


def _skeleton(config: dict[str, Any]) -> nn.Module:
    """A model as `config` describes it; its arrays are lazy and cost nothing until they are used."""
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(dict(config))
    network: nn.Module = model_class(arguments.from_dict(dict(config)))
    if quantization := config.get("quantization"):
        nn.quantize(network, quantization["group_size"], quantization["bits"])
    return network
