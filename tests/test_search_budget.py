"""Half of a space over the budget, on the real model: none of it is started, none of the rest goes over."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_search import run_search

from search.space import proposed
from tasks.config import ModelSettings, Settings, TrainSettings
from tasks.models.resolve import resolve_model
from tasks.prepare.pipeline import prepare_data
from tasks.train.memory.estimate import estimate_memory


@pytest.mark.slow
@pytest.mark.real
def test_no_trial_is_measured_over_a_budget_that_half_of_the_space_exceeds(store: Path) -> None:
    layers = (1, 2, 16, 30)
    settings = Settings.model_validate(
        {
            "data": {"max_rows": 60, "max_seq_length": 128},
            "train": {"epochs": 0.3, "batch_size": 4},
            "search": {"num_layers": layers, "rank": 8, "trials": 6, "workers": 1, "rungs": "none"},
        }
    )
    model = resolve_model(ModelSettings())
    data = prepare_data(settings.data, model)

    def price(proposal: TrainSettings) -> int:
        return estimate_memory(proposal, model, data, base_stays=True).peak_bytes

    prices = [price(proposed(settings, {"num_layers": count, "learning_rate": 1e-4}, 30)) for count in layers]
    assert prices == sorted(prices)
    budget_bytes = (prices[1] + prices[2]) // 2
    study = run_search(settings, model, data, budget_bytes, price)
    trials = list(study.trials.values())
    over = [trial for trial in trials if trial.state == "over budget"]
    trained = [trial for trial in trials if trial.state == "trained"]
    assert {trial.params["num_layers"] for trial in over} <= {16, 30}
    assert over
    assert len(trained) == 6
    assert {trial.params["num_layers"] for trial in trained} <= {1, 2}
    told = [
        (trial.params, trial.standing.predicted_bytes, trial.standing.measured_bytes) for trial in trained
    ]
    assert all(0 < trial.standing.measured_bytes <= budget_bytes for trial in trained), (budget_bytes, told)
    assert not any(trial.run_id or trial.standing.measured_bytes for trial in over), "never started"
    for trial in over:
        assert study.stored.get_trials()[trial.number].constraints["memory"] > 0
    best = study.best()
    assert best is not None
    assert best.val_loss == min(trial.val_loss for trial in trained)
