"""Trials live inside the budget: what would not fit is never started and is told to Optuna."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from search.budget import parse_budget
from search.space import check_space
from search.study import Trained, best_trial, create_study, run_trials
from tasks.config import Settings, TrainSettings, load_settings
from tasks.errors import InputError, StepError


def settings(trials: int) -> Settings:
    return load_settings(None, [f"search.trials={trials}"])


def price(proposal: TrainSettings) -> int:
    return proposal.num_layers * 10**9


def loss(proposal: TrainSettings, number: int) -> Trained:
    return Trained(abs(proposal.learning_rate - 3e-4) * 1000, {"mlflow.run_id": f"run-{number}"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8 * 10**9), ("512MiB", 512 * 2**20), ("75%", 750), (" 1.5 gb ", 15 * 10**8)],
)
def test_budgets_are_amounts_or_shares(text: str, expected: int) -> None:
    assert parse_budget(text, free_bytes=1000) == expected


@pytest.mark.parametrize("text", ["", "8", "GB", "-1GB", "0GB", "120%", "8 parsecs", "8TB"])
def test_other_budgets_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match="such as 8GB"):
        parse_budget(text, free_bytes=1000)


def test_a_proposal_over_the_budget_is_never_trained_and_is_infeasible_in_optuna() -> None:
    trained: list[int] = []

    def train(proposal: TrainSettings, number: int) -> Trained:
        trained.append(proposal.num_layers)
        return loss(proposal, number)

    study = create_study("budget", settings(8))
    trials = run_trials(study, settings(8), 8 * 10**9, price, train)
    assert max(trained) <= 8
    assert len(trained) == 8
    over = [trial.number for trial in trials if trial.state == "over budget"]
    assert over
    for trial in study.trials:
        assert (max(trial.constraints.values()) > 0) == (trial.number in over)
        assert (trial.state == optuna.trial.TrialState.PRUNED) == (trial.number in over)


def test_a_budget_that_nothing_fits_ends_instead_of_proposing_for_ever() -> None:
    study = create_study("nothing fits", settings(2))
    trials = run_trials(study, settings(2), 1, price, loss)
    assert {trial.state for trial in trials} == {"over budget"}
    assert best_trial(trials) is None


def test_a_failed_trial_is_told_and_the_study_goes_on() -> None:
    def train(proposal: TrainSettings, number: int) -> Trained:
        if number == 0:
            raise StepError("loss nan")
        return loss(proposal, number)

    study = create_study("failure", settings(3))
    trials = run_trials(study, settings(3), 10**12, price, train)
    assert [trial.state for trial in trials] == ["failed", "trained", "trained"]
    assert study.trials[0].state == optuna.trial.TrialState.FAIL
    best = best_trial(trials)
    assert best is not None
    assert best.number == study.best_trial.number
    assert study.best_trial.user_attrs["mlflow.run_id"] == f"run-{best.number}"


def test_an_interrupted_trial_is_not_left_running() -> None:
    def train(proposal: TrainSettings, number: int) -> Trained:
        raise KeyboardInterrupt

    study = create_study("interrupted", settings(3))
    with pytest.raises(KeyboardInterrupt):
        run_trials(study, settings(3), 10**12, price, train)
    assert [trial.state for trial in study.trials] == [optuna.trial.TrialState.FAIL]


def test_more_layers_than_the_model_has_are_refused_before_the_first_trial() -> None:
    with pytest.raises(InputError, match="holds 16: the model has 4 layers"):
        check_space(Settings(), layers_in_model=4)
    check_space(load_settings(None, ["search.num_layers=[-1, 4]"]), layers_in_model=4)


def test_proposals_stay_in_the_space_and_keep_the_other_settings(home: Path) -> None:
    wanted = load_settings(
        None, ["search.trials=6", "search.rank=[3, 5]", "search.num_layers=[-1, 2]", "train.batch_size=7"]
    )
    trials = run_trials(create_study("space", wanted), wanted, 10**12, lambda proposal: 1, loss)
    for trial in trials:
        assert trial.settings.rank in (3, 5)
        assert trial.settings.num_layers in (-1, 2)
        assert 3e-5 <= trial.settings.learning_rate <= 1e-3
        assert trial.settings.batch_size == 7
    assert (home / "optuna.db").is_file()
