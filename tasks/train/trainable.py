"""How many numbers a run would train, from a model's config alone: no weights, no memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.config import TrainSettings
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, count_parameters
from tasks.train.outline import outline
from tasks.train.quantised_base import check_base
from tasks.train.targets import target_keys


def count_trainable(config: Mapping[str, Any], settings: TrainSettings) -> int:
    """Trainable parameters of `settings` on the model that a `config.json` describes.

    Raises:
        InputError: the model does not allow these settings.
    """
    check_base(settings.method, config)
    model = outline(config)
    keys = target_keys(model, settings.targets, settings.num_layers)
    add_adapter(model, adapter_config(settings, len(model.layers), keys), settings.seed)
    return count_parameters(adapter_weights(model))
