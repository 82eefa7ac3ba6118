"""What `tunesmith estimate` tells: the peak of a run by its parts, what fits, and a table of known models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tasks.budget import parse_budget
from tasks.config import Settings, TrainSettings
from tasks.models.resolve import model_config, tokenizer_folder
from tasks.prepare.pipeline import prepared_folder
from tasks.prepare.splits import load_splits
from tasks.progress import progress
from tasks.train.memory.afterwards import estimate_afterwards
from tasks.train.memory.budget import free_memory, plan_of_rows
from tasks.train.memory.estimate import Breakdown, MemoryEstimate
from tasks.train.memory.fitting import Change, Largest, Plan, nearest_that_fits, what_fits
from tasks.train.memory.known_models import KNOWN_MODELS, shallow
from tasks.train.memory.row_sizes import RowSizes


@dataclass(frozen=True)
class Told:
    """What is told of one run.

    Attributes:
        rows: of what rows it is told, in words.
        fits: the largest value of each setting within the budget.
        changes: the nearest settings that fit, where the run does not; None where none do.
        afterwards: what follows the training, by name, each at its own highest moment.
    """

    estimate: MemoryEstimate
    budget_bytes: int
    rows: str = ""
    fits: list[Largest] = field(default_factory=list)
    changes: list[Change] | None = field(default_factory=list)
    afterwards: Mapping[str, Breakdown] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether the run would not be started."""
        return self.estimate.peak_bytes > self.budget_bytes

    @property
    def phases(self) -> dict[str, Breakdown]:
        """Those of the training, and what follows it."""
        return {**self.estimate.phases, **self.afterwards}

    @property
    def over_afterwards(self) -> list[str]:
        """What follows the training and takes more than the budget, which is the training's."""
        return [name for name, parts in self.afterwards.items() if parts.bytes > self.budget_bytes]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "peak_bytes": self.estimate.peak_bytes,
            "phase": self.estimate.phase,
            "phases": {name: parts.parts() for name, parts in self.phases.items()},
            "budget_bytes": self.budget_bytes,
            "over_afterwards": self.over_afterwards,
            "rows": self.rows,
            "fits": [asdict(each) for each in self.fits],
            "changes": [
                {"settings": list(each.overrides), "why": each.why, "peak_bytes": each.peak_bytes}
                for each in self.changes or []
            ],
        }


LENGTH = 512
"""Tokens of rows that are not known."""


def estimate_run(settings: Settings, length: int | None, with_fits: bool) -> Told:
    """Predict the run of these settings.

    Args:
        length: tokens of a row, half of them supervised; None for the prepared rows, where they are prepared.

    Raises:
        InputError: the model does not exist, or does not allow the settings.
    """
    budget_bytes = parse_budget(settings.train.budget, free_memory())
    with progress("what the run takes"):
        plan, rows = _plan(settings, length)
        told = Told(plan.estimate(), budget_bytes, rows)
        told = replace(told, afterwards=estimate_afterwards(settings, plan.config, plan.valid))
    if told.is_over:
        with progress("settings that fit"):
            told = replace(told, changes=nearest_that_fits(plan, budget_bytes))
    if with_fits:
        with progress("what fits") as bar:
            for largest in what_fits(plan, budget_bytes, _layers(plan.config)):
                told.fits.append(largest)
                bar.advance(note=largest.setting)
    return told


def _plan(settings: Settings, length: int | None) -> tuple[Plan, str]:
    """What decides the run's memory, and of what rows it is, in words."""
    config = model_config(settings.model)
    prepared = _prepared(settings) if length is None else None
    if prepared is not None:
        plan = plan_of_rows(settings.train, config, load_splits(prepared))
        longest = int(max(rows.lengths.max() for rows in (plan.train, plan.valid)))
        return plan, f"prepared data, longest {longest:,} tokens"
    rows = _alike(length or LENGTH)
    why = "the data is not prepared yet" if length is None else "as given"
    told = f"{length or LENGTH:,} tokens each, half supervised; {why}"
    return Plan(settings.train, config, rows, rows), told


def _prepared(settings: Settings) -> Path | None:
    """The folder of the prepared data, where there is one; nothing is prepared or downloaded."""
    model = tokenizer_folder(settings.model)
    return prepared_folder(settings.data, model) if model else None


def _alike(length: int) -> RowSizes:
    return RowSizes.alike(length, max(1, length // 2))


METHODS: Mapping[str, dict[str, Any]] = {
    "LoRA": {"method": "lora"},
    "QLoRA, 4 bits": {"method": "lora"},
    "full": {"method": "full"},
}
"""The columns of the table: all layers are adapted, one row a batch, recomputing activations."""


def estimate_table(length: int) -> dict[str, dict[str, int]]:
    """Peak bytes by model and method, of the real shapes in `KNOWN_MODELS`.

    A layer costs what the layer before it cost: traced are two depths of each model, the rest is their line.
    """
    rows = _alike(length)
    found: dict[str, dict[str, int]] = {}
    with progress("table", total=len(KNOWN_MODELS) * len(METHODS)) as bar:
        for name, config in KNOWN_MODELS.items():
            found[name] = {}
            for title, given in METHODS.items():
                settings = TrainSettings(num_layers=-1, batch_size=1, grad_checkpoint=True, **given)
                stored = {"quantization": {"bits": 4, "group_size": 64}} if "bits" in title else {}
                found[name][title] = _on_a_line(settings, {**config, **stored}, rows)
                bar.advance(note=name)
    return found


TRACED_LAYERS = (3, 5)


def _on_a_line(settings: TrainSettings, config: Mapping[str, Any], rows: RowSizes) -> int:
    few, more = TRACED_LAYERS
    low, high = (
        Plan(settings, shallow(config, layers), rows, rows).estimate().peak_bytes for layers in TRACED_LAYERS
    )
    return round(low + (high - low) * (_layers(config) - few) / (more - few))


def _layers(config: Mapping[str, Any]) -> int:
    return int({**config, **config.get("text_config", {})}["num_hidden_layers"])
