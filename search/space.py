"""From an Optuna trial to training settings."""

from __future__ import annotations

import optuna

from tasks.config import Settings, TrainSettings
from tasks.errors import InputError


def check_space(settings: Settings, layers_in_model: int) -> None:
    """Refuse a space that the model does not have, before the first trial rather than in the night.

    Raises:
        InputError: `search.num_layers` holds more layers than the model, or an adapter to begin from
            leaves no rank and layers to choose.
    """
    if settings.train.from_adapter is not None:
        raise InputError(
            f"train.from_adapter = '{settings.train.from_adapter}': a search chooses rank and layers, "
            "which the adapter has already; leave it out, or train on from it with 'tunesmith finetune'"
        )
    if (most := max(settings.search.num_layers)) > layers_in_model:
        raise InputError(
            f"search.num_layers holds {most}: the model has {layers_in_model} layers; "
            f"give numbers up to {layers_in_model}, or -1 for all"
        )


def suggest(trial: optuna.Trial, settings: Settings) -> TrainSettings:
    """The training settings with learning rate, rank and number of layers proposed by the trial."""
    space = settings.search
    proposed = {
        "learning_rate": trial.suggest_float(
            "learning_rate", space.learning_rate.low, space.learning_rate.high, log=True
        ),
        "rank": trial.suggest_categorical("rank", space.rank),
        "num_layers": trial.suggest_categorical("num_layers", space.num_layers),
    }
    return settings.train.model_copy(update=proposed)
