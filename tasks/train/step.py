"""The training step: base model and prepared data in, a published adapter out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config import TrainSettings
from tasks.errors import InputError
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput, output_folder, remove_drafts, run_step, write_json
from tasks.tracking import Run
from tasks.train.use import USE_FILE, write_use

if TYPE_CHECKING:
    import mlx.nn as nn

    from tasks.train.checkpoints import Checkpoints
    from tasks.train.loop import Report
    from tasks.train.memory.budget import Allowed
    from tasks.train.state import Training

log = logging.getLogger(__name__)

TRAINING_FILE = "training.json"
ADAPTER_FILES = ("adapters.safetensors", "adapter_config.json", TRAINING_FILE, USE_FILE)

TRAINING_TAG = "tunesmith.training"
"""The fingerprint of what a run trains."""

NO_PART = {"steps_per_save", "minutes_per_save", "prefix_cache_gb", "from_adapter", "budget", "adapt"}
"""Settings that decide how often a run is saved and what may lie where, and not what it finds."""

LOW_RANK_ONLY = {"rank", "alpha", "rank_stabilized", "scale"}
"""Settings of LoRA and DoRA."""


def train_adapter(settings: TrainSettings, model: ModelFolder, data: StepOutput, run: Run) -> StepOutput:
    """Train an adapter, or find the one already trained from equal inputs; log it to the run either way.

    A training that was stopped or killed goes on from its newest checkpoint. The output holds the
    adapter in mlx-lm's layout, `training.json` (settings, fingerprints, history, summary figures and
    advice) and `use.json`, what it is used with. An adapter found again, and a training that goes on,
    bring their history to the run.

    Raises:
        InputError: the model does not allow the settings, as more layers than it has; or the run has
            begun another training; or it would take more memory than `train.budget`.
        StepError: a loss or gradient is not finite; `OverBudget` when it takes more than was predicted.
    """
    from tasks.train.checkpoints import checkpoints_folder, owned, remove_checkpoints
    from tasks.train.memory.budget import within_budget
    from tasks.train.starting_point import begin_from

    settings, start = begin_from(settings, model)
    allowed = None
    if not output_folder("train", training_inputs(settings, model, data, start)).is_dir():
        settings, allowed = within_budget(settings, model, data)
    inputs = training_inputs(settings, model, data, start)
    target = output_folder("train", inputs)
    folder = checkpoints_folder(target.name)
    _check_same_training(run, target.name)
    with owned(folder, f"MLflow run {run.id}"):
        remove_drafts(target.parent, target.name)
        output = run_step(
            "train", inputs, lambda draft: _train(draft, settings, model, data, inputs, run, start, allowed)
        )
        remove_checkpoints(folder)
    training = output.read_json(TRAINING_FILE)
    if output.reused:
        for step, metrics in training["history"]:
            run.report(step, metrics)
    run.set_tags({"tunesmith.best_step": training["best_step"]})
    run.report(training["best_step"], {"best_val_loss": training["best_val_loss"]})
    run.log_files(output.path, "adapter", only=ADAPTER_FILES)
    return output


def training_inputs(
    settings: TrainSettings, model: ModelFolder, data: StepOutput, start: Path | None = None
) -> dict[str, Any]:
    """Everything the adapter depends on, and its checkpoints with it; `start` is the one it begins from."""
    from tasks.train.starting_point import adapter_fingerprint

    return {
        **({"from_adapter": adapter_fingerprint(start)} if start else {}),
        "model": model.fingerprint,
        "data": data.fingerprint,
        "settings": settings.model_dump(mode="json", exclude=_no_part(settings)),
        "device": _device(),
    }


def _no_part(settings: TrainSettings) -> set[str]:
    """The settings that change nothing of what these settings train."""
    found = set(NO_PART)
    if settings.method != "soft-prompt":
        found.add("prompt_tokens")
    if settings.method not in ("lora", "dora"):
        found |= LOW_RANK_ONLY
    elif settings.scale is not None:
        found |= {"alpha", "rank_stabilized"}
    if settings.patience is None:
        found.add("min_gain")
    return found


def _check_same_training(run: Run, fingerprint: str) -> None:
    """Let a run that is resumed hold the curve of one training, not pieces of two."""
    known = run.tag(TRAINING_TAG)
    if known not in (None, fingerprint):
        raise InputError(
            f"run {run.id} has begun another training ({known}, now {fingerprint}): its model, its data or "
            "Tunesmith itself have changed since; 'tunesmith finetune' starts anew"
        )
    run.set_tags({TRAINING_TAG: fingerprint})


@dataclass(frozen=True)
class Fitted:
    """A training, finished or paused, and what its adapter is in mlx-lm's words."""

    training: Training
    config: Mapping[str, Any]
    trainable_parameters: int


def fit_adapter(
    network: nn.Module,
    settings: TrainSettings,
    model: ModelFolder,
    data: StepOutput,
    checkpoints: Checkpoints,
    report: Report,
    start: Path | None = None,
    until_step: int | None = None,
    allowed: Allowed | None = None,
) -> Fitted:
    """Put an adapter onto `network` and train it, to the end or until it pauses at `until_step`.

    Args:
        network: of `model`, as it was loaded; it is changed.
        start: the adapter to begin from.
        allowed: the memory the run may take; what it takes is learnt from.

    Raises:
        OverBudget: it takes more than that.
    """
    import mlx.core as mx

    from tasks.prepare.splits import load_splits
    from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, count_parameters
    from tasks.train.frozen_prefix import base_identity, without_frozen_layers
    from tasks.train.loop import fit
    from tasks.train.memory.calibration import learn
    from tasks.train.memory_guard import MemoryGuard, holding_back
    from tasks.train.starting_point import take_weights
    from tasks.train.targets import target_keys

    splits = load_splits(data.path)
    keys = target_keys(network, settings.targets, settings.num_layers)
    config = adapter_config(settings, len(network.layers), keys)
    add_adapter(network, config, settings.seed)
    if start:
        take_weights(network, start)
    trainable = count_parameters(adapter_weights(network))
    mx.reset_peak_memory()
    guard = MemoryGuard(allowed.budget_bytes) if allowed else None
    with holding_back(allowed.limit_bytes) if allowed else nullcontext():
        fitted = without_frozen_layers(
            network, {name: splits[name] for name in ("train", "valid")}, settings, base_identity(model)
        )
        preparing_bytes = mx.get_peak_memory()
        report(0, {"peak_memory_before_training": preparing_bytes / 1e9})
        training = fit(
            network, fitted["train"], fitted["valid"], settings, report, checkpoints, until_step, guard
        )
    if allowed and allowed.estimate:
        report(0, {"predicted_peak_memory": allowed.estimate.peak_bytes / 1e9})
        learn(allowed.estimate, max(preparing_bytes, round(training.peak_memory * 1e9)))
    return Fitted(training, config, trainable)


def write_adapter(
    draft: Path, fitted: Fitted, model: ModelFolder, data: StepOutput, inputs: Mapping[str, Any]
) -> None:
    """Write the output of a training that has ended into an empty folder."""
    from tasks.train.adapters import save_adapter
    from tasks.train.health import advice

    told = advice(fitted.training.history)
    for sentence in told:
        log.warning("%s", sentence)
    save_adapter(draft, fitted.training.best_weights, dict(fitted.config))
    write_use(draft, model, data)
    figures = {**fitted.training.summary(), "trainable_parameters": fitted.trainable_parameters}
    write_json(draft / TRAINING_FILE, {**figures, "advice": told, "inputs": inputs})


def _train(
    draft: Path,
    settings: TrainSettings,
    model: ModelFolder,
    data: StepOutput,
    inputs: Mapping[str, Any],
    run: Run,
    start: Path | None,
    allowed: Allowed | None,
) -> None:
    from tasks.models.load import load_model
    from tasks.train.checkpoints import Checkpoints, checkpoints_folder
    from tasks.train.quantised_base import check_base

    check_base(settings.method, model.config())
    network = load_model(model.path).model
    checkpoints = Checkpoints(checkpoints_folder(output_folder("train", inputs).name), settings)
    fitted = fit_adapter(network, settings, model, data, checkpoints, run.report, start, allowed=allowed)
    run.set_tags({"tunesmith.trainable_parameters": fitted.trainable_parameters})
    write_adapter(draft, fitted, model, data, inputs)


def _device() -> str:
    from tasks.models.device import device_name

    return device_name()
