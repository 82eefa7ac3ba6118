"""From an Optuna trial to training settings."""

from __future__ import annotations

import optuna

from tasks.config import Settings, TrainSettings


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
