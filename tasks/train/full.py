"""Full training: the weights themselves, of the last layers or of everything."""

from __future__ import annotations

from itertools import chain

import mlx.nn as nn

from tasks.train.quantised_base import check_modules

KIND = "full"


def unfreeze(model: nn.Module, num_layers: int) -> None:
    """Let the last `num_layers` layers of a frozen model be trained; -1: embeddings, norms and head too.

    Raises:
        InputError: weights among them are quantised, and would stay as they are without a word.
    """
    trained = [model] if num_layers == -1 else model.layers[-num_layers:]
    check_modules(KIND, chain.from_iterable(part.modules() for part in trained))
    for part in trained:
        part.unfreeze()
