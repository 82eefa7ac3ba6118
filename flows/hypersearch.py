"""The search flow: trials of one study as nested MLflow runs, each within the memory budget.

Run it as `tunesmith search CONFIG.yaml --trials 12 --budget 8GB`.

Annotations here are real types, not text: Prefect (3.8.8) cannot resolve the text when a served
schedule loads the flow.
"""

import time
from dataclasses import dataclass

from prefect import flow

from flows.finetune import prefect_tags
from search.budget import parse_budget
from search.space import check_space
from search.study import Trained, Trial, best_trial, create_study, run_trials
from tasks.config import Settings, TrainSettings
from tasks.models import import_model
from tasks.prepare import prepare
from tasks.tracking import Run, mlflow_run
from tasks.train import train
from tasks.train.memory import estimate_memory, free_memory
from tasks.train.step import TRAINING_FILE


@dataclass(frozen=True)
class SearchOutcome:
    """A finished search.

    Attributes:
        study: its name in Optuna and in MLflow.
        run: the parent run.
    """

    study: str
    trials: list[Trial]
    budget_bytes: int
    run: Run

    @property
    def best(self) -> Trial | None:
        """The trial to finetune with."""
        return best_trial(self.trials)


@flow(name="search")
def hypersearch(settings: Settings) -> SearchOutcome:
    """Search learning rate, rank and layer count for the lowest validation loss within a memory budget."""
    name = f"{settings.name or 'search'}-{time.strftime('%Y%m%d-%H%M%S')}"
    budget_bytes = parse_budget(settings.search.budget, free_memory())
    with mlflow_run(settings, name, {**prefect_tags(), "optuna.study": name}) as parent:
        model = import_model(settings.model)
        check_space(settings, model.language_config()["num_hidden_layers"])
        data = prepare(settings.data, model, parent)
        study = create_study(name, settings)

        def price(proposal: TrainSettings) -> int:
            return estimate_memory(proposal, model, data).peak_bytes

        def train_trial(proposal: TrainSettings, number: int) -> Trained:
            trial = settings.model_copy(update={"train": proposal})
            tags = {**prefect_tags(), "optuna.study": name, "optuna.trial": str(number)}
            with mlflow_run(trial, f"trial-{number}", tags, parent) as run:
                run.report(0, {"predicted_memory": price(proposal) / 1e9})
                named = train.with_options(task_run_name=f"trial-{number}")
                adapter = named(proposal, model, data, run)
                loss = adapter.read_json(TRAINING_FILE)["best_val_loss"]
                return Trained(loss, {"mlflow.run_id": run.id, "adapter": str(adapter.path)})

        trials = run_trials(study, settings, budget_bytes, price, train_trial)
        outcome = SearchOutcome(name, trials, budget_bytes, parent)
        log_leaderboard(outcome)
        return outcome


def log_leaderboard(outcome: SearchOutcome) -> None:
    """Every proposal, excluded ones too, as a table of the parent run, and the best one's figures."""
    trials = outcome.trials
    outcome.run.log_table(
        {
            "trial": [trial.number for trial in trials],
            "state": [trial.state for trial in trials],
            "val_loss": [trial.val_loss for trial in trials],
            "learning_rate": [trial.settings.learning_rate for trial in trials],
            "rank": [trial.settings.rank for trial in trials],
            "num_layers": [trial.settings.num_layers for trial in trials],
            "predicted_memory_gb": [trial.predicted_bytes / 1e9 for trial in trials],
        },
        "leaderboard.json",
    )
    outcome.run.report(0, {"over_budget": sum(trial.state == "over budget" for trial in trials)})
    if outcome.best:
        outcome.run.report(0, {"best_val_loss": outcome.best.val_loss})
        outcome.run.set_tags({"optuna.best_trial": outcome.best.number})
