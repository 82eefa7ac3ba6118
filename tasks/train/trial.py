"""A trial of a search: an ordinary training that pauses at a rung and goes on from there when it is wanted.

It trains what `train_adapter` trains of the same settings, in the same checkpoints folder, byte for byte,
so that a finished trial is found by a finetune of its settings and need not be trained again.
"""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.config import TrainSettings
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput, output_folder, remove_drafts, run_step
from tasks.train.step import TRAINING_FILE, fit_adapter, training_inputs, write_adapter

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from tasks.train.loop import Report
    from tasks.train.memory.budget import Allowed


@dataclass(frozen=True)
class Reached:
    """Where a trial stands.

    Attributes:
        step: updates done.
        steps: updates planned.
        val_losses: (updates done, validation loss), without that before training.
        ended_by: the setting that ended the training; empty for one that is paused.
        seconds: of training so far, over all its starts.
        peak_bytes: of MLX, the highest of all starts.
        adapter: the published adapter, once it has ended.
    """

    step: int
    steps: int
    val_losses: tuple[tuple[int, float], ...]
    ended_by: str
    seconds: float
    peak_bytes: int
    adapter: Path | None


class WarmBase:
    """A base model that stays in memory from trial to trial, and is never changed by one."""

    def __init__(self, model: ModelFolder) -> None:
        from tasks.models.load import load_model

        self.model = model
        self.network: nn.Module = load_model(model.path).model

    def twin(self) -> nn.Module:
        """A network of its own around the same arrays: modules are copied, weights are shared.

        Whatever a training does to it, adapters, layers taken out, weights replaced, the base stays as it
        was loaded; and what was frozen or in training mode for the last trial is not for the next.
        """
        from mlx.utils import tree_flatten

        parameters: dict[str, mx.array] = dict(tree_flatten(self.network.parameters()))
        shared = {id(array): array for array in parameters.values()}
        return copy.deepcopy(self.network, shared)


def train_trial(
    settings: TrainSettings,
    base: WarmBase,
    data: StepOutput,
    report: Report,
    until_step: int | None,
    allowed: Allowed | None = None,
) -> Reached:
    """Train to the end, or until `until_step`, a multiple of `steps_per_eval`, where that comes before.

    A trial that has been there goes on from its newest checkpoint; one that has ended is found.

    Raises:
        InputError: the model does not allow the settings.
        OverBudget: it took more memory than is `allowed`; a checkpoint is kept.
        StepError: a loss or gradient is not finite.
    """
    from tasks.train.checkpoints import Checkpoints, checkpoints_folder, owned, remove_checkpoints
    from tasks.train.quantised_base import check_base

    check_base(settings.method, base.model.config())
    inputs = training_inputs(settings, base.model, data)
    target = output_folder("train", inputs)
    folder = checkpoints_folder(target.name)
    _forget_the_last_trial()
    with owned(folder, "a search"):
        remove_drafts(target.parent, target.name)
        if target.is_dir():
            return _published(target, report)
        checkpoints = Checkpoints(folder, settings)
        fitted = fit_adapter(
            base.twin(), settings, base.model, data, checkpoints, report, None, until_step, allowed
        )
        training = fitted.training
        if training.ended_by:
            run_step("train", inputs, lambda draft: write_adapter(draft, fitted, base.model, data, inputs))
            remove_checkpoints(folder)
    return Reached(
        training.step,
        training.steps,
        _val_losses(training.history),
        training.ended_by,
        training.seconds,
        int(training.peak_memory * 1e9),
        target if training.ended_by else None,
    )


def drop_trial(settings: TrainSettings, model: ModelFolder, data: StepOutput) -> None:
    """Remove the checkpoints of a trial that will not go on."""
    from tasks.train.checkpoints import checkpoints_folder, owned, remove_checkpoints

    folder = checkpoints_folder(output_folder("train", training_inputs(settings, model, data)).name)
    if folder.is_dir():
        with owned(folder, "a search"):
            remove_checkpoints(folder)


def _published(target: Path, report: Report) -> Reached:
    """A training that ended before, in this search or another."""
    found = StepOutput(target, target.name, True, 0.0).read_json(TRAINING_FILE)
    history = [(step, metrics) for step, metrics in found["history"]]
    for step, metrics in history:
        report(step, metrics)
    return Reached(
        found["steps"],
        found["planned_steps"],
        _val_losses(history),
        found["ended_by"],
        found["seconds"],
        int(found["peak_memory"] * 1e9),
        target,
    )


def _val_losses(history: list[tuple[int, dict[str, float]]]) -> tuple[tuple[int, float], ...]:
    return tuple((step, metrics["val_loss"]) for step, metrics in history if step and "val_loss" in metrics)


def _forget_the_last_trial() -> None:
    """Free what it left behind, so that the peak of the next is its own."""
    import mlx.core as mx

    gc.collect()
    mx.clear_cache()
