"""Holding a run to its budget before it starts: refused, or changed so that it fits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.budget import parse_budget
from tasks.config import TrainSettings
from tasks.errors import InputError
from tasks.models.folder import ModelFolder
from tasks.prepare.splits import load_splits
from tasks.progress import progress
from tasks.publish import StepOutput
from tasks.train.frozen_prefix import Splits, frozen_depth, worth_keeping
from tasks.train.memory.estimate import Breakdown, MemoryEstimate, Prefixed
from tasks.train.memory.fitting import Change, Plan, nearest_that_fits
from tasks.train.memory.probe import calibrate_once
from tasks.train.memory.row_sizes import RowSizes

log = logging.getLogger(__name__)

UNTRACEABLE = (AttributeError, TypeError, ValueError, IndexError, KeyError)
"""What a model's code raises that is called in another way than mlx-lm's language models are, and MLX where
it cannot export an operation."""


@dataclass(frozen=True)
class Allowed:
    """What a run may take.

    Attributes:
        estimate: of its settings; None where the model's code cannot be traced, or somebody else made it.
        share_bytes: of the budget, for one of several runs at work together.
    """

    budget_bytes: int
    estimate: MemoryEstimate | None = None
    share_bytes: int | None = None

    @property
    def limit_bytes(self) -> int:
        """What MLX is held to while it runs."""
        predicted = self.estimate.limit_bytes if self.estimate else None
        known = (self.budget_bytes, self.share_bytes, predicted)
        return min(each for each in known if each is not None)


def within_budget(
    settings: TrainSettings, model: ModelFolder, data: StepOutput
) -> tuple[TrainSettings, Allowed]:
    """The settings to train with, and the peak predicted for them.

    With `train.adapt` settings over `train.budget` are changed in the order that costs least quality, and
    what was changed is said.

    Raises:
        InputError: over budget, with the breakdown and the nearest settings that fit.
    """
    budget_bytes = parse_budget(settings.budget, free_memory())
    plan = plan_of(settings, model, data)
    calibrate_once()
    try:
        with progress("memory of the run"):
            estimate = plan.estimate()
    except UNTRACEABLE as error:
        log.warning(
            "the memory of this model cannot be predicted (%s): train.budget holds while it runs", error
        )
        return settings, Allowed(budget_bytes, None)
    if estimate.peak_bytes <= budget_bytes:
        return settings, Allowed(budget_bytes, estimate)
    with progress("settings that fit"):
        changes = nearest_that_fits(plan, budget_bytes, training_only=settings.adapt)
    if not settings.adapt or not changes:
        raise InputError(_refusal(settings, estimate, budget_bytes, changes or []))
    for change in changes:
        log.warning("to stay within %s: %s (%s)", settings.budget, " ".join(change.overrides), change.why)
    adapted = changes[-1].plan
    return adapted.settings, Allowed(budget_bytes, adapted.estimate())


def plan_of(settings: TrainSettings, model: ModelFolder, data: StepOutput, base_stays: bool = False) -> Plan:
    """What decides the memory of training on prepared data."""
    return plan_of_rows(settings, model.config(), load_splits(data.path), base_stays)


def plan_of_rows(
    settings: TrainSettings, config: Mapping[str, Any], splits: Splits, base_stays: bool = False
) -> Plan:
    """The same of the base's `config.json` and the prepared rows."""
    valid = splits["valid"].first(settings.valid_rows) if settings.valid_rows else splits["valid"]
    layers = int({**config, **config.get("text_config", {})}["num_hidden_layers"])
    kept = worth_keeping(splits, settings) if frozen_depth(settings, layers) else set()
    prefixed = Prefixed("train" in kept, "valid" in kept, base_stays)
    return Plan(settings, config, RowSizes.of(splits["train"]), RowSizes.of(valid), prefixed)


def in_words(parts: Breakdown) -> str:
    """The parts of a breakdown that count, largest first."""
    sizes = sorted(parts.parts().items(), key=lambda each: -each[1])
    return ", ".join(f"{name} {amount(size)}" for name, size in sizes if abs(size) >= 0.01 * parts.bytes)


def amount(size_bytes: int) -> str:
    """As GB, small ones as MB."""
    return f"{size_bytes / 1e9:.2f} GB" if abs(size_bytes) >= 1e8 else f"{size_bytes / 1e6:.2f} MB"


def free_memory() -> int:
    """Bytes a run may take: Metal's recommended working set on a Mac, what a GPU of its own has free, else
    what the machine has available."""
    import mlx.core as mx
    import psutil

    from tasks.models.device import own_memory_bytes

    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    if own_memory_bytes():
        return int(mx.device_info().get("free_memory", own_memory_bytes()))
    return int(psutil.virtual_memory().available)


def _refusal(
    settings: TrainSettings, estimate: MemoryEstimate, budget_bytes: int, changes: list[Change]
) -> str:
    told = (
        f"train.budget = {settings.budget}: the run would take {amount(estimate.peak_bytes)} while "
        f"{estimate.phase}, of {amount(budget_bytes)} ({in_words(estimate.at_peak)})"
    )
    if not changes:
        return f"{told}; no change of settings fits: take a smaller base, or raise train.budget"
    overrides = " ".join(override for each in changes for override in each.overrides)
    return (
        f"{told}; with '{overrides}' it takes {amount(changes[-1].peak_bytes)}: give those, "
        "or train.adapt=true"
    )
