"""LoRA and DoRA in mlx-lm's own layers, drawn from a seed."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tasks.config import TrainSettings
from tasks.models.mlx_lm_import import import_mlx_lm
from tasks.train.quantised_base import check_modules
from tasks.train.targets import adaptable

KINDS = ("lora", "dora")


def low_rank_scale(settings: TrainSettings) -> float:
    """What the product of A and B is multiplied by.

    alpha / rank (Hu et al. 2021, arXiv:2106.09685), alpha / √rank when stabilised (Kalajdzievski
    2023, arXiv:2312.03732), or `scale` itself.
    """
    if settings.scale is not None:
        return settings.scale
    return settings.alpha / (math.sqrt(settings.rank) if settings.rank_stabilized else settings.rank)


def wrap(model: nn.Module, config: dict[str, Any]) -> None:
    """Wrap the modules that `adapter_config.json` names, in the last layers of a frozen model.

    Their matrices are float32 whatever the base's type: bfloat16 would swallow most updates. They are
    multiplied in the type of what they are given, see `_in_type_of_input`.

    Raises:
        InputError: DoRA on modules that mlx-lm has none for.
    """
    import_mlx_lm()
    from mlx_lm.tuner.lora import LoRALinear
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters, layers = config["lora_parameters"], config["num_layers"]
    keys = parameters.get("keys")
    adapted = (
        module
        for layer in model.layers[-layers:]
        for path, module in layer.named_modules()
        if (adaptable(module) if keys is None else path in keys)
    )
    check_modules(config["fine_tune_type"], adapted)
    linear_to_lora_layers(model, layers, parameters, use_dora=config["fine_tune_type"] == "dora")
    for module in model.modules():
        if type(module) is LoRALinear:
            module.__class__ = _in_type_of_input()


@cache
def _in_type_of_input() -> type[Any]:
    """mlx-lm's LoRA layer, whose products are of the type of what it is given, as all others of the model.

    mlx-lm's own (0.32.2) multiplies in float32, for which the input and the whole output are copied into
    float32, and in the backward pass again: of a step in bfloat16 on an H200 that is a third.
    """
    from mlx_lm.tuner.lora import LoRALinear

    class InTypeOfInput(LoRALinear):
        def __call__(self, x: mx.array) -> mx.array:
            inner = self.scale * (self.dropout(x) @ self.lora_a.astype(x.dtype))  # (…, rank)
            y: mx.array = self.linear(x) + inner @ self.lora_b.astype(x.dtype)
            return y

    return InTypeOfInput


def draw(model: nn.Module, seed: int) -> None:
    """Fill every A from `seed`, in the order of the sorted names, uniform in ±1/√(input width).

    B is zero, so that the model's output is unchanged; DoRA's magnitudes are those of the base.
    """
    trainable = dict(tree_flatten(model.trainable_parameters()))
    names = sorted(name for name in trainable if name.endswith("lora_a"))
    keys = mx.random.split(mx.random.key(seed), len(names))
    drawn = []
    for name, key in zip(names, keys, strict=True):
        shape = trainable[name].shape  # (inputs, rank), or (experts, rank, inputs)
        bound = 1 / math.sqrt(shape[0] if len(shape) == 2 else shape[-1])
        drawn.append((name, mx.random.uniform(-bound, bound, shape, key=key)))
    model.load_weights(drawn, strict=False)
