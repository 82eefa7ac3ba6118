"""The study: propose, price, train, tell. Optuna keeps it under `mlruns/optuna.db`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import optuna
from filelock import FileLock

from search.space import suggest
from tasks.config import Settings, TrainSettings
from tasks.errors import StepError
from tasks.home import runs_dir
from tasks.progress import progress

log = logging.getLogger(__name__)

PROPOSALS_A_TRIAL = 10
"""The search ends after this many proposals for each trial wanted, trained or not."""


@dataclass(frozen=True)
class Trained:
    """What training a proposal gave.

    Attributes:
        val_loss: of the best adapter.
        links: attributes of the Optuna trial that lead to its runs elsewhere.
    """

    val_loss: float
    links: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One proposal and what became of it.

    Attributes:
        state: `trained`; `over budget`, never started; or `failed` while training.
        predicted_bytes: the peak memory expected of it.
        val_loss: of the best adapter; NaN unless trained.
    """

    number: int
    settings: TrainSettings
    predicted_bytes: int
    state: Literal["trained", "over budget", "failed"]
    val_loss: float = math.nan


def create_study(name: str, settings: Settings) -> optuna.Study:
    """A new study, sampled by TPE. A fresh database is set up by one process at a time."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    runs_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(runs_dir() / ".optuna.lock"):
        return optuna.create_study(
            study_name=name,
            storage=f"sqlite:///{runs_dir() / 'optuna.db'}",
            sampler=optuna.samplers.TPESampler(seed=settings.search.seed, n_startup_trials=5),
            pruner=optuna.pruners.NopPruner(),
        )


def run_trials(
    study: optuna.Study,
    settings: Settings,
    budget_bytes: int,
    price: Callable[[TrainSettings], int],
    train: Callable[[TrainSettings, int], Trained],
) -> list[Trial]:
    """Run `settings.search.trials` trials, lowest validation loss wanted; proposals over budget are extra.

    Args:
        price: predicts the peak memory of a proposal, in bytes.
        train: trains a proposal, given its number.
    """
    trials: list[Trial] = []
    wanted = settings.search.trials
    with progress("search", total=wanted) as bar:
        for _ in range(wanted * PROPOSALS_A_TRIAL):
            trial = _run_trial(study, settings, budget_bytes, price, train)
            trials.append(trial)
            if trial.state != "over budget":
                bar.advance(1, _best_note(trials))
                wanted -= 1
            if not wanted:
                break
    return trials


def best_trial(trials: list[Trial]) -> Trial | None:
    """The trained trial of the lowest validation loss, if any was trained."""
    trained = [trial for trial in trials if trial.state == "trained"]
    return min(trained, key=lambda trial: trial.val_loss, default=None)


def _run_trial(
    study: optuna.Study,
    settings: Settings,
    budget_bytes: int,
    price: Callable[[TrainSettings], int],
    train: Callable[[TrainSettings, int], Trained],
) -> Trial:
    """Ask for one proposal and tell the study what became of it."""
    asked = study.ask()
    proposal = suggest(asked, settings)
    predicted = price(proposal)
    asked.set_constraint("memory", (predicted - budget_bytes) / budget_bytes)
    if predicted > budget_bytes:
        log.info("trial %d needs %.1f GB, over the budget: not started", asked.number, predicted / 1e9)
        study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        return Trial(asked.number, proposal, predicted, "over budget")
    try:
        trained = train(proposal, asked.number)
    except StepError as error:
        log.warning("trial %d failed: %s", asked.number, error)
        study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return Trial(asked.number, proposal, predicted, "failed")
    except BaseException:
        study.tell(asked, state=optuna.trial.TrialState.FAIL)
        raise
    for name, value in trained.links.items():
        asked.set_user_attr(name, value)
    study.tell(asked, trained.val_loss)
    return Trial(asked.number, proposal, predicted, "trained", trained.val_loss)


def _best_note(trials: list[Trial]) -> str:
    best = best_trial(trials)
    return f"best val_loss {best.val_loss:.4f}" if best else ""
