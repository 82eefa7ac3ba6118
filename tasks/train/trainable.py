"""How many numbers a run would train, from a model's config alone: no weights, no memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.config import TrainSettings
from tasks.models.mlx_lm_import import import_mlx_lm
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, count_parameters
from tasks.train.quantised_base import check_base
from tasks.train.targets import target_keys


def count_trainable(config: Mapping[str, Any], settings: TrainSettings) -> int:
    """Trainable parameters of `settings` on the model that a `config.json` describes.

    The model is built by mlx-lm and its arrays, which are lazy, are never evaluated.

    Raises:
        InputError: the model does not allow these settings.
    """
    import_mlx_lm()
    from mlx_lm.utils import _get_classes

    check_base(settings.method, config)
    model_class, arguments = _get_classes(dict(config))
    model = model_class(arguments.from_dict(dict(config)))
    keys = target_keys(model, settings.targets, settings.num_layers)
    add_adapter(model, adapter_config(settings, len(model.layers), keys), settings.seed)
    return count_parameters(adapter_weights(model))
