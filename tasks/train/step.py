"""The training step: base model and prepared data in, a published adapter out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.config import TrainSettings
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput, run_step, write_json
from tasks.tracking import Run

TRAINING_FILE = "training.json"
ADAPTER_FILES = ("adapters.safetensors", "adapter_config.json", TRAINING_FILE)


def train_adapter(settings: TrainSettings, model: ModelFolder, data: StepOutput, run: Run) -> StepOutput:
    """Train an adapter, or find the one already trained from equal inputs; log it to the run either way.

    The output holds the adapter in mlx-lm's layout and `training.json`: settings, fingerprints,
    history and summary figures. An adapter found again brings its recorded history to the new run.

    Raises:
        InputError: the model has fewer layers than `num_layers`.
        StepError: a loss or gradient is not finite.
    """
    inputs = {
        "model": model.fingerprint,
        "data": data.fingerprint,
        "settings": settings.model_dump(mode="json"),
        "device": _device(),
    }
    output = run_step("train", inputs, lambda draft: _train(draft, settings, model, data, inputs, run))
    training = output.read_json(TRAINING_FILE)
    if output.reused:
        for step, metrics in training["history"]:
            run.report(step, metrics)
    run.set_tags({"tunesmith.best_step": training["best_step"]})
    run.report(training["best_step"], {"best_val_loss": training["best_val_loss"]})
    run.log_files(output.path, "adapter", only=ADAPTER_FILES)
    return output


def _train(
    draft: Path,
    settings: TrainSettings,
    model: ModelFolder,
    data: StepOutput,
    inputs: Mapping[str, Any],
    run: Run,
) -> None:
    from tasks.models.load import load_model
    from tasks.prepare.splits import load_splits
    from tasks.train.adapters import (
        adapter_config,
        adapter_weights,
        add_adapter,
        count_parameters,
        save_adapter,
    )
    from tasks.train.loop import fit

    splits = load_splits(data.path)
    network = load_model(model.path).model
    config = adapter_config(settings, len(network.layers))
    add_adapter(network, config, settings.seed)
    trainable = count_parameters(adapter_weights(network))
    run.set_tags({"tunesmith.trainable_parameters": trainable})
    training = fit(network, splits["train"], splits["valid"], settings, run.report)
    save_adapter(draft, training.best_weights, config)
    write_json(
        draft / TRAINING_FILE,
        {**training.summary(), "trainable_parameters": trainable, "inputs": inputs},
    )


def _device() -> str:
    from tasks.models.device import device_name

    return device_name()
