"""A model without its weights: modules and shapes, as a `config.json` describes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from tasks.models.mlx_lm_import import import_mlx_lm


def outline(config: Mapping[str, Any]) -> nn.Module:
    """The network that mlx-lm builds from a model's config, plain also where the weights are quantised.

    Its arrays are lazy: as long as none is evaluated it takes neither memory nor time.
    """
    import_mlx_lm()
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(dict(config))
    network: nn.Module = model_class(arguments.from_dict(dict(config)))
    return network
