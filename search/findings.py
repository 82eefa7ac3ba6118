"""What a search has taught, in figures and in words."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from search.proposals import study_in_memory
from search.study import GIGABYTE, Study, Trial, objective_values

LEAST_TRIALS = 8
"""Fewer say nothing about which parameter decides."""

SAME = 0.005
"""Of the loss: values of a parameter that differ by less brought nothing."""

WORTH_A_SENTENCE = 0.05
"""Of importance."""

NAMES = {
    "learning_rate": "learning rate",
    "num_layers": "the number of layers",
    "batch_size": "batch size",
    "targets": "the choice of modules",
}

ORDER = ("trained", "waiting", "pruned", "failed", "infeasible", "over budget")


@dataclass(frozen=True)
class Findings:
    """What was learnt.

    Attributes:
        importance: the share of each parameter in how the loss varies (PED-ANOVA), largest first; empty
            where there are too few trials.
        sentences: the same and more in words.
    """

    importance: Mapping[str, float]
    sentences: Sequence[str]


def findings(study: Study) -> Findings:
    """Importance and sentences of a study, finished or not."""
    importance = parameter_importance(study)
    sentences = [*_decided(importance), *_brought_nothing(study, importance), *_at_the_edge(study)]
    return Findings(importance, [*sentences, *_front(study), *_did_not_fit(study), *_saved(study)])


def leaderboard(study: Study) -> dict[str, list[Any]]:
    """Every proposal as columns, best first, excluded ones last."""
    trials = ranked(study)
    names = sorted({name for trial in trials for name in trial.params})
    columns: dict[str, Callable[[Trial], Any]] = {
        "trial": lambda trial: trial.number,
        "state": lambda trial: trial.state,
        "val_loss": lambda trial: trial.val_loss if math.isfinite(trial.val_loss) else None,
        **{name: partial(_score, name) for name in study.scores},
        "rung": lambda trial: f"{len(trial.losses)}/{len(trial.standing.rung_steps)}",
        **{name: partial(_parameter, name) for name in names},
        "steps": lambda trial: trial.step,
        "seconds": lambda trial: round(trial.standing.seconds, 1),
        "predicted_gb": lambda trial: round(trial.standing.predicted_bytes / GIGABYTE, 3),
        "measured_gb": lambda trial: round(trial.standing.measured_bytes / GIGABYTE, 3) or None,
        "reason": lambda trial: trial.standing.reason,
        "run": lambda trial: trial.run_id,
    }
    return {name: [value(trial) for trial in trials] for name, value in columns.items()}


def _score(name: str, trial: Trial) -> float | None:
    return trial.standing.scores.get(name)


def _parameter(name: str, trial: Trial) -> Any:
    return trial.params.get(name)


def ranked(study: Study) -> list[Trial]:
    """Those trained to the end, best first by the first objective; then those that got farthest, by loss."""

    def place(trial: Trial) -> tuple[int, int, float, int]:
        loss = trial.val_loss if math.isfinite(trial.val_loss) else math.inf
        if trial.state == "trained":
            loss = objective_values(trial, study.objectives)[0]
        return ORDER.index(trial.state), -len(trial.losses), loss, trial.number

    return sorted(study.trials.values(), key=place)


def comparable(study: Study) -> list[tuple[Trial, float]]:
    """Trials with their losses at the first rung that all of them have reached: after the same rows."""
    there = [trial for trial in study.trials.values() if trial.losses and trial.state != "failed"]
    rung = min((len(trial.losses) for trial in there), default=1) - 1
    return [(trial, trial.losses[rung]) for trial in there if math.isfinite(trial.losses[rung])]


def as_completed(study: Study) -> optuna.Study:
    """A study in memory in which every comparable trial is complete, for Optuna's own evaluations."""
    stored = study.stored.get_trials(deepcopy=False)
    copy = study_in_memory()
    for trial, loss in comparable(study):
        copy.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE,
                params=dict(trial.params),
                distributions=stored[trial.number].distributions,
                value=loss,
            )
        )
    return copy


def parameter_importance(study: Study) -> dict[str, float]:
    """The share of each parameter, by PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255)."""
    completed = as_completed(study)
    if len(completed.trials) < LEAST_TRIALS or not completed.trials[0].params:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = optuna.importance.get_param_importances(completed)
        except (RuntimeError, ValueError):  # all losses are equal
            return {}
    return {name: share for name, share in found.items() if math.isfinite(share)}


def _decided(importance: Mapping[str, float]) -> list[str]:
    told = [f"{_name(name)} decided {share:.0%}" for name, share in importance.items() if share >= 0.01]
    return [_sentence(", ".join(told))] if told else []


def _brought_nothing(study: Study, importance: Mapping[str, float]) -> list[str]:
    """Of parameters with several values, the larger ones that were no better on average."""
    told = []
    for name in importance:
        distribution = _distributions(study).get(name)
        if not isinstance(distribution, CategoricalDistribution):
            continue
        means = _means(study, name)
        if len(means) < 2 or not all(isinstance(value, int | float) for value in means):
            continue
        values = sorted(means)
        best = min(means.values())
        least = next(value for value in values if means[value] <= best * (1 + SAME))
        if least != values[-1]:
            told.append(f"{_name(name)} above {least:g} brought nothing")
        elif importance[name] >= WORTH_A_SENTENCE:
            told.append(f"{_name(name)} {least:g}, the largest that was tried, was best on average")
    return [_sentence(each) for each in told]


def _means(study: Study, name: str) -> dict[Any, float]:
    """The mean of the better half of the losses by value: poor learning rates say nothing about the rest."""
    losses: dict[Any, list[float]] = {}
    for trial, loss in comparable(study):
        losses.setdefault(trial.params[name], []).append(loss)
    return {value: fmean(sorted(each)[: math.ceil(len(each) / 2)]) for value, each in losses.items()}


def _at_the_edge(study: Study) -> list[str]:
    """The best learning rate close to an end of its range: there may be better beyond."""
    best = next(iter(ranked(study)), None)
    distribution = _distributions(study).get("learning_rate")
    if best is None or not best.losses or not isinstance(distribution, FloatDistribution):
        return []
    low, high = math.log(distribution.low), math.log(distribution.high)
    place = (math.log(best.params["learning_rate"]) - low) / (high - low)
    end = "lower" if place < 0.05 else "upper" if place > 0.95 else ""
    if not end:
        return []
    return [f"The best learning rate is at the {end} end of its range: a wider one may hold a better."]


def _front(study: Study) -> list[str]:
    """Of several objectives: which trials are worth a choice between them."""
    if len(study.objectives) == 1 or not (numbers := study.front()):
        return []
    named = ", ".join(map(str, numbers))
    return [
        f"No trial is better in {', '.join(study.objectives[:-1])} and {study.objectives[-1]} than {named}."
    ]


def _did_not_fit(study: Study) -> list[str]:
    states = [trial.state for trial in study.trials.values()]
    told = []
    if over := states.count("over budget"):
        told.append(f"{over} of {len(states)} proposals did not fit the budget and were not started.")
    if died := states.count("infeasible"):
        told.append(f"{died} of {len(states)} ended their process while they were trained.")
    if failed := states.count("failed"):
        told.append(f"{failed} of {len(states)} failed, as by a loss that is not finite.")
    return told


def _saved(study: Study) -> list[str]:
    begun = [trial for trial in study.trials.values() if trial.standing.val_losses]
    steps = sum(trial.step for trial in begun)
    full = sum(trial.standing.rung_steps[-1] for trial in begun)
    if not begun or steps == full:
        return []
    return [f"{len(begun)} trials took {steps:,} updates; to their ends they would have taken {full:,}."]


def _distributions(study: Study) -> Mapping[str, BaseDistribution]:
    stored = study.stored.get_trials(deepcopy=False)
    return stored[0].distributions if stored else {}


def _name(name: str) -> str:
    return NAMES.get(name, name)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
