"""The bundled model learns from the standard library's docstrings, in a few real steps."""

from __future__ import annotations

import pytest

from tasks.config import load_settings
from tasks.models.load import load_model
from tasks.models.resolve import resolve_model
from tasks.prepare.pipeline import prepare_data
from tasks.prepare.splits import load_splits
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, count_parameters
from tasks.train.loop import fit


@pytest.mark.real
def test_five_steps_on_the_bundled_model_lower_the_validation_loss() -> None:
    settings = load_settings(None, ["train.max_steps=5", "train.learning_rate=2e-3", "train.warmup_steps=1"])
    folder = resolve_model(settings.model)
    data = prepare_data(settings.data, folder)
    splits = load_splits(data.path)
    network = load_model(folder.path).model
    add_adapter(network, adapter_config(settings.train, len(network.layers)), seed=0)
    # Eight layers of seven linear modules at rank 8.
    assert count_parameters(adapter_weights(network)) == 651_264
    training = fit(network, splits["train"], splits["valid"].first(16), settings.train, lambda *_: None)
    assert 3 < training.val_loss_before < 5
    assert training.best_val_loss < 0.95 * training.val_loss_before
