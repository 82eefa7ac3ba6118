"""The study: propose, price, train, tell. Optuna keeps it under `mlruns/optuna.db`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
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
    train: Callable[[TrainSettings, int], float],
) -> list[Trial]:
    """Run `settings.search.trials` trials, lowest validation loss wanted; proposals over budget are extra.

    Args:
        price: predicts the peak memory of a proposal, in bytes.
        train: trains a proposal, given its number, and returns its validation loss.
    """
    trials: list[Trial] = []
    wanted = settings.search.trials
    with progress("search", total=wanted) as bar:
        while (
            _count(trials, "over budget", others=True) < wanted and len(trials) < wanted * PROPOSALS_A_TRIAL
        ):
            trials.append(_run_trial(study, settings, budget_bytes, price, train))
            if trials[-1].state != "over budget":
                bar.advance(1, _best_note(trials))
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
    train: Callable[[TrainSettings, int], float],
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
        loss = train(proposal, asked.number)
    except StepError as error:
        log.warning("trial %d failed: %s", asked.number, error)
        study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return Trial(asked.number, proposal, predicted, "failed")
    except BaseException:
        study.tell(asked, state=optuna.trial.TrialState.FAIL)
        raise
    study.tell(asked, loss)
    return Trial(asked.number, proposal, predicted, "trained", loss)


def _count(trials: list[Trial], state: str, others: bool) -> int:
    return sum((trial.state == state) != others for trial in trials)


def _best_note(trials: list[Trial]) -> str:
    best = best_trial(trials)
    return f"best val_loss {best.val_loss:.4f}" if best else ""
