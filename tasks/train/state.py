"""Where a training run stands: the one record that a checkpoint holds and that the end hands on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import mlx.core as mx

ARRAYS = "best_weights"


@dataclass
class Training:
    """A training run after `step` updates.

    Attributes:
        steps: updates planned; `patience` or `max_minutes` may end the run before.
        seed, batch_size, accumulation_steps: what `position` means.
        step: updates done.
        epoch, position: where the next batch is taken from: this epoch (from 0), after so many batches.
        trained_tokens: supervised ones.
        seconds: spent training, validation and saving included, over all starts of the run.
        peak_memory: of MLX, in GB (1e9 bytes), the highest of all starts.
        best_val_loss, best_step: of the lowest validation loss after an update; step 0 when there is none.
        best_weights: the adapter of `best_step`.
        ended_by: the setting that ended the run; empty until then.
        history: (updates done, metrics) in order, as reported.
    """

    steps: int
    seed: int
    batch_size: int
    accumulation_steps: int
    step: int = 0
    epoch: int = 0
    position: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    peak_memory: float = 0.0
    best_val_loss: float = math.inf
    best_step: int = 0
    best_weights: dict[str, mx.array] = field(default_factory=dict)
    ended_by: str = ""
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Training:
        """What `plain` gave, read back from JSON."""
        history = [(step, metrics) for step, metrics in plain["history"]]
        return cls(**{**plain, "history": history})

    def plain(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON values."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != ARRAYS}

    def summary(self) -> dict[str, Any]:
        """What a finished run found out, as JSON values; `steps` are those that were done."""
        progress = ("step", "epoch", "position", "seed", "batch_size", "accumulation_steps")
        figures = {name: value for name, value in self.plain().items() if name not in progress}
        done = {"steps": self.step, "planned_steps": self.steps, "val_loss_before": self.val_loss_before}
        return {**figures, **done}

    def note(self, metrics: Mapping[str, float]) -> None:
        """Add figures to the history's entry of this step."""
        if self.history and self.history[-1][0] == self.step:
            self.history[-1][1].update(metrics)
        else:
            self.history.append((self.step, dict(metrics)))

    @property
    def val_losses(self) -> list[float]:
        """The validation losses in order, that before training first."""
        return [metrics["val_loss"] for _, metrics in self.history if "val_loss" in metrics]

    @property
    def val_loss_before(self) -> float:
        """The validation loss before the first update."""
        return self.val_losses[0]

    @property
    def validated(self) -> bool:
        """Whether the weights of this step have been validated."""
        return bool(self.history) and self.history[-1][0] == self.step and "val_loss" in self.history[-1][1]

    def validations_without_gain(self, min_gain: float) -> int:
        """Validations since the last that fell by more than `min_gain` under the one that fell before it."""
        reference, since = math.inf, 0
        for loss in self.val_losses:
            gained = loss < reference - min_gain
            reference, since = (loss, 0) if gained else (reference, since + 1)
        return since
