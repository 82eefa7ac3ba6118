"""What to try next: a function of (seed, number, what is known then), the same in a search that goes on.

Optuna's sampler is asked in a study in memory that holds what the proposal may know. In the stored study a
trial that waits at a rung is RUNNING, and its loss there would teach the sampler nothing; and a sampler that
draws from one generator for the whole search would draw other numbers after a kill.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.trial import TrialState

from search.space import Params, all_values, combinations
from tasks.errors import InputError

STARTUP_TRIALS = 6
"""Proposals at random before the sampler believes in what it sees."""

REDRAWS = 8
"""A proposal that was made before is drawn again so often; then one is taken that was not."""


@dataclass(frozen=True)
class Known:
    """An earlier proposal, as the sampler is told of it.

    Attributes:
        values: of the objectives, lowest wanted; None while nothing is known.
        violation: over 0 where it did not fit; how much, for one never started, as a share of the budget.
        stopped_at: the rung at which it stopped before those it is compared with, so worse than they.
    """

    params: Params
    values: tuple[float, ...] | None = None
    violation: float = 0.0
    stopped_at: int | None = None


def propose(
    space: Mapping[str, BaseDistribution],
    known: Sequence[Known],
    seed: int,
    sampler: Literal["tpe", "gp"],
    objectives: int = 1,
) -> dict[str, Any] | None:
    """The next proposal; None when there is none that was not made before.

    Args:
        known: all earlier proposals, in their order.
        seed: of the search.
    """
    tried = {_key(each.params) for each in known}
    if len(tried) >= combinations(space):
        return None
    study = study_in_memory(objectives)
    study.add_trials([_as_trial(each, space) for each in known])
    for attempt in range(REDRAWS):
        study.sampler = _sampler(sampler, _drawn([seed, len(known), attempt]))
        params = study.ask(dict(space)).params
        if _key(params) not in tried:
            return {name: params[name] for name in space}
    if combinations(space) == float("inf"):
        return params
    return _untried(space, tried, np.random.default_rng([seed, len(known)]))


def study_in_memory(objectives: int = 1) -> optuna.Study:
    """An empty study that nobody else sees, without a line of log about it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=["minimize"] * objectives, pruner=optuna.pruners.NopPruner())


def check_sampler(sampler: Literal["tpe", "gp"]) -> None:
    """Refuse a sampler that would fail after the first trials.

    Raises:
        InputError: the GP sampler without PyTorch.
    """
    if sampler == "gp":
        try:
            import torch  # type: ignore[import-not-found]  # noqa: F401
        except ImportError:
            raise InputError(
                "search.sampler = gp: it needs PyTorch ('pip install torch'), which is not installed; "
                "the default, tpe, does not"
            ) from None


def _sampler(name: Literal["tpe", "gp"], seed: int) -> BaseSampler:
    if name == "gp":
        return GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
    return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, constant_liar=True)


def _drawn(entropy: list[int]) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _as_trial(known: Known, space: Mapping[str, BaseDistribution]) -> optuna.trial.FrozenTrial:
    state = TrialState.RUNNING if known.values is None else TrialState.COMPLETE
    stopped = {}
    if known.violation > 0:
        state = TrialState.PRUNED
    elif known.values is not None and known.stopped_at is not None:
        state, stopped = TrialState.PRUNED, {known.stopped_at: known.values[0]}
    return optuna.trial.create_trial(
        state=state,
        params=dict(known.params),
        distributions=dict(space),
        values=known.values if state == TrialState.COMPLETE else None,
        intermediate_values=stopped,
        constraints={"budget": known.violation},
    )


def _untried(
    space: Mapping[str, BaseDistribution], tried: set[tuple[Any, ...]], random: np.random.Generator
) -> dict[str, Any] | None:
    each = [all_values(distribution) for distribution in space.values()]
    left = [
        values
        for values in itertools.product(*each)
        if _key(dict(zip(space, values, strict=True))) not in tried
    ]
    return dict(zip(space, left[int(random.integers(len(left)))], strict=True)) if left else None


def _key(params: Params) -> tuple[Any, ...]:
    return tuple(sorted(params.items()))
