"""The space of a search: from settings to Optuna's distributions, and from their values back to settings.

A parameter that is fixed is no distribution: it is laid over `train` as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from tasks.config import Range, SearchSettings, Settings, TrainSettings, WholeRange
from tasks.errors import InputError

PARAMETERS = (
    "learning_rate",
    "rank",
    "num_layers",
    "alpha",
    "scale",
    "dropout",
    "batch_size",
    "epochs",
    "targets",
)
"""Of `search`, those that become settings of `train` of the same name."""

UNFIT_METHODS = {"full": ("rank", "alpha", "scale", "dropout", "targets"), "soft-prompt": PARAMETERS[1:6]}
"""Parameters that a way of training does not have."""

Params = Mapping[str, Any]
"""What Optuna knows of a proposal: a value for each distribution."""


def search_space(space: SearchSettings, layers_in_model: int) -> dict[str, BaseDistribution]:
    """The distributions of what is varied, by name, in a fixed order."""
    given = _given(space, layers_in_model)
    return {name: _distribution(value) for name, value in given.items() if _varies(value)}


def proposed(settings: Settings, params: Params, layers_in_model: int) -> TrainSettings:
    """The training settings of a proposal.

    The frozen layers are computed before the first trial and pay for themselves over all of them, so a
    trial reads them although it may see each row but once.
    """
    given = _given(settings.search, layers_in_model)
    fixed = {name: value for name, value in given.items() if not _varies(value)}
    single = {name: value[0] if isinstance(value, tuple) else value for name, value in fixed.items()}
    update = {**single, **params}
    if isinstance(targets := update.get("targets"), str):
        update["targets"] = tuple(name.strip() for name in targets.split(","))
    if settings.train.frozen_prefix == "auto":
        update["frozen_prefix"] = "always"
    return TrainSettings.model_validate({**settings.train.model_dump(), **update})


def combinations(space: Mapping[str, BaseDistribution]) -> float:
    """How many different proposals there are; infinite with a range of real numbers."""
    return math.prod(map(_values, space.values()))


def all_values(distribution: BaseDistribution) -> Sequence[Any]:
    """Every value of a finite distribution."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1)
    raise ValueError(f"{distribution} has no end of values")


def check_space(settings: Settings, layers_in_model: int) -> None:
    """Refuse a space that the model does not have, before the first trial rather than in the night.

    Raises:
        InputError: names the setting and what it can be.
    """
    train, space = settings.train, settings.search
    if train.from_adapter is not None:
        raise InputError(
            f"train.from_adapter = '{train.from_adapter}': a search chooses rank and layers, "
            "which the adapter has already; leave it out, or train on from it with 'tunesmith finetune'"
        )
    if train.max_minutes is not None:
        raise InputError(
            f"train.max_minutes = {train.max_minutes:g}: trials that end by the clock see unequal numbers of "
            "rows and cannot be compared; limit train.epochs or train.max_steps, or the search by search.time"
        )
    _check_lengths(settings)
    for name, value in _given(space, layers_in_model).items():
        most = _largest(value)
        if name == "num_layers" and most > layers_in_model:
            raise InputError(
                f"search.num_layers holds {most}: the model has {layers_in_model} layers; "
                f"give numbers up to {layers_in_model}, or -1 for all"
            )
        if name in UNFIT_METHODS.get(train.method, ()) and _varies(value):
            raise InputError(
                f"search.{name}: train.method {train.method} has no {name}; give search.{name} one value"
            )


def _check_lengths(settings: Settings) -> None:
    """Every trial is given the same rows: a count of updates does not say so when the batches differ."""
    steps, space = settings.train.max_steps, settings.search
    if steps is None:
        return
    for name in ("batch_size", "epochs"):
        if _varies(getattr(space, name)):
            raise InputError(
                f"search.{name} varies and train.max_steps = {steps}: trials would be given unequal numbers "
                "of rows; leave train.max_steps out and give train.epochs"
            )


def _given(space: SearchSettings, layers_in_model: int) -> dict[str, Any]:
    """What `search` says of each parameter, if anything; shares of layers as numbers of layers."""
    given = {name: getattr(space, name) for name in PARAMETERS}
    layers = given["num_layers"]
    if isinstance(layers, tuple):  # L/8 and L/4 of a small model may be the same number
        given["num_layers"] = tuple(dict.fromkeys(_layers(each, layers_in_model) for each in layers))
    elif isinstance(layers, str):
        given["num_layers"] = _layers(layers, layers_in_model)
    return {name: value for name, value in given.items() if value is not None}


def _layers(value: int | str, layers_in_model: int) -> int:
    if isinstance(value, int):
        return value
    _, _, divisor = value.partition("/")
    return max(1, layers_in_model // int(divisor or 1))


def _varies(value: object) -> bool:
    return isinstance(value, Range) or (isinstance(value, tuple) and len(value) > 1)


def _distribution(value: Any) -> BaseDistribution:
    if isinstance(value, WholeRange):
        return IntDistribution(value.low, value.high, log=value.log)
    if isinstance(value, Range):
        return FloatDistribution(value.low, value.high, log=value.log)
    return CategoricalDistribution(value)


def _values(distribution: BaseDistribution) -> float:
    return math.inf if isinstance(distribution, FloatDistribution) else len(all_values(distribution))


def _largest(value: Any) -> Any:
    if isinstance(value, Range):
        return value.high
    return max(value) if isinstance(value, tuple) else value
