"""What the trials of a search share, computed before the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.config import TrainSettings
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput

if TYPE_CHECKING:
    import mlx.nn as nn


def record_for_trials(
    settings: TrainSettings,
    base: ModelFolder,
    data: StepOutput,
    num_layers: Sequence[int],
    network: nn.Module | None = None,
) -> None:
    """Compute the frozen prefixes of all `num_layers` that trials may have, in one pass over each split.

    A trial finds what it would otherwise compute itself; it decides by its own settings, as trained alone,
    so nothing is computed here that a trial of `settings` does not ask for.

    Args:
        network: of `base`, where it is in memory already.
    """
    from tasks.models.load import load_model
    from tasks.prepare.splits import load_splits
    from tasks.train.frozen_prefix import base_identity, record_prefixes

    splits = load_splits(data.path)
    network = load_model(base.path).model if network is None else network
    fitted = {name: splits[name] for name in ("train", "valid")}
    record_prefixes(network, fitted, settings, num_layers, base_identity(base))
