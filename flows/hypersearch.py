"""The search flow: the trials of a study as nested MLflow runs within a memory budget, then the best one.

Run it as `tunesmith search CONFIG.yaml --trials 12 --budget 8GB`, go on with `tunesmith search --resume`.

Annotations here are real types, not text: Prefect (3.8.8) cannot resolve the text when a served
schedule loads the flow.
"""

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import prefect.runtime.flow_run
from prefect import flow

from flows.finetune import finetune, given_settings, prefect_tags
from flows.flow_run import begin_flow_run, close_mlflow_runs, link_mlflow_run
from flows.live_progress import live_progress
from flows.notify import notify
from flows.resume import settings_as_yaml
from search.budget import parse_budget
from search.findings import findings, leaderboard
from search.plots import draw_study
from search.proposals import check_sampler
from search.space import check_space
from search.study import Study, Trial, create_study, held, open_study, read_study
from search.trial_runs import TrialRuns
from search.trials import Search
from tasks.config import Settings, TrackingSettings, TrainSettings, load_settings
from tasks.errors import InputError
from tasks.machine import machine_turn
from tasks.models.folder import ModelFolder
from tasks.models.task import import_model
from tasks.prepare.task import prepare
from tasks.publish import StepOutput, output_folder
from tasks.system_metrics import system_metrics
from tasks.tracking import Run, mlflow_run, reopened, stored_runs
from tasks.train.memory import estimate_memory, free_memory
from tasks.train.step import training_inputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchOutcome:
    """A finished search.

    Attributes:
        study: its name in Optuna and in MLflow.
        run: the parent run.
        best_settings: what the best trial trained; None when none was trained.
        best_run: the MLflow run of its finetune; empty without one.
    """

    study: str
    trials: list[Trial]
    budget_bytes: int
    run: Run
    best: Trial | None
    best_settings: TrainSettings | None
    best_run: str


@flow(
    name="search",
    flow_run_name=lambda: _flow_run_name(),
    on_completion=[notify],
    on_failure=[close_mlflow_runs, notify],
    on_crashed=[close_mlflow_runs, notify],
    on_cancellation=[close_mlflow_runs, notify],
)
def hypersearch(settings: Settings, resumed: str | None = None) -> SearchOutcome:
    """Search hyperparameters for the lowest validation loss within a memory budget, and finetune with them.

    `resumed` is the name of a study with these settings that was stopped or killed and is to be continued.
    """
    begin_flow_run(settings)
    check_sampler(settings.search.sampler)
    study = read_study(resumed) if resumed else _new_study(settings)
    with held(study.name):
        study = open_study(study.name)  # as it is now that nobody else writes to it
        tags = {**prefect_tags(), "optuna.study": study.name}
        flow_runs = [*study.attributes.get("prefect.flow_run_ids", []), tags["prefect.flow_run_id"]]
        study.remember(**{"prefect.flow_run_ids": flow_runs})
        parent_id = _parent_run(settings, study.name) if resumed else None
        try:
            with (
                live_progress(),
                mlflow_run(settings, study.name, tags, resumed=parent_id) as parent,
                system_metrics(parent, parent.started_ms()),
            ):
                study.remember(**{"mlflow.run_id": parent.id})
                link_mlflow_run(parent.uri, parent.experiment_id, parent.id)
                with machine_turn(f"search {study.name}", settings.flow.when_busy):
                    return _search(study, settings, parent)
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C, exit, Prefect's termination signal
                log.warning("'tunesmith search --resume %s' goes on from here", study.name)
            raise


def resumable_settings(study: str) -> Settings:
    """The settings of a search that was stopped; its tracking store is that of the environment.

    Raises:
        InputError: there is no such study, or it has come to its end.
    """
    attributes = read_study(study).attributes
    if "settings" not in attributes:
        raise InputError(f"study '{study}' is none of a search; 'tunesmith study' shows those that are")
    if attributes.get("finished"):
        raise InputError(f"search '{study}' is finished: 'tunesmith study {study}' shows what it found")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.yaml"
        path.write_text(attributes["settings"], encoding="utf-8")
        settings = load_settings(path)
    if settings.tracking.uri and "***" in settings.tracking.uri:  # its password was not kept
        return settings.model_copy(
            update={"tracking": TrackingSettings(experiment=settings.tracking.experiment)}
        )
    return settings


def _search(study: Study, settings: Settings, parent: Run) -> SearchOutcome:
    """The body of the flow, within the search's MLflow run."""
    model = import_model(settings.model)
    check_space(settings, model.language_config()["num_hidden_layers"])
    data = prepare(settings.data, model, parent)
    _check_unchanged(study, settings, model, data)
    budget_bytes = _budget_bytes(study, settings)
    runs = TrialRuns(settings, study, parent, prefect_tags())
    runs.adopt()
    search = Search(study, settings, model, data, budget_bytes, _priced(model, data), runs)
    trials = search.run()
    best = study.best()
    best_settings = search.settings_of(best.params)[0] if best else None
    log_study(study, parent)
    best_run = ""
    if best and best_settings and settings.search.finetune:
        best_run = _finetune_best(study, settings, best, best_settings, parent)
    study.remember(finished=True)
    return SearchOutcome(study.name, trials, budget_bytes, parent, best, best_settings, best_run)


def _priced(model: ModelFolder, data: StepOutput) -> Callable[[TrainSettings], int]:
    """The predicted peak of a proposal, which takes seconds: the same for every learning rate."""
    known: dict[str, int] = {}

    def price(proposal: TrainSettings) -> int:
        key = proposal.model_dump_json(exclude={"learning_rate"})
        if key not in known:
            known[key] = estimate_memory(proposal, model, data, base_stays=True).peak_bytes
        return known[key]

    return price


def log_study(study: Study, run: Run) -> None:
    """The leaderboard, what was learnt, and the plots, as artifacts of the search's run."""
    run.log_table(leaderboard(study), "leaderboard.json")
    found = findings(study)
    run.log_text("\n".join(found.sentences) + "\n", "findings.txt")
    run.report(0, {f"importance/{name}": share for name, share in found.importance.items()})
    states = [trial.state for trial in study.trials.values()]
    run.report(0, {"over_budget": states.count("over budget"), "infeasible": states.count("infeasible")})
    if best := study.best():
        run.report(0, {"best_val_loss": best.val_loss})
        run.set_tags({"optuna.best_trial": best.number})
    with tempfile.TemporaryDirectory() as folder:
        draw_study(study, Path(folder))
        run.log_files(Path(folder), "plots")


def _new_study(settings: Settings) -> Study:
    name = f"{settings.name or 'search'}-{time.strftime('%Y%m%d-%H%M%S')}"
    study = create_study(name, settings.search.objectives)
    study.remember(settings=settings_as_yaml(settings), finished=False)
    return study


def _parent_run(settings: Settings, name: str) -> str | None:
    """The search's run in MLflow; None when it was killed before it had one."""
    return next((run.id for run in stored_runs(settings.tracking) if run.name == name), None)


def _check_unchanged(study: Study, settings: Settings, model: ModelFolder, data: StepOutput) -> None:
    """A search compares trainings on the same rows, of the same base, by the same code."""
    now = output_folder("train", training_inputs(settings.train, model, data)).name
    before = study.attributes.get("training")
    if before not in (None, now):
        raise InputError(
            f"search '{study.name}': its model, its data or Tunesmith itself have changed since it began "
            f"({before}, now {now}); 'tunesmith search' with its config starts anew"
        )
    study.remember(training=now)


def _budget_bytes(study: Study, settings: Settings) -> int:
    """As it was when the search began: a share of what is free means another amount each time."""
    if "budget_bytes" not in study.attributes:
        study.remember(budget_bytes=parse_budget(settings.search.budget, free_memory()))
    return int(study.attributes["budget_bytes"])


def _finetune_best(
    study: Study, settings: Settings, best: Trial, best_settings: TrainSettings, parent: Run
) -> str:
    """Finetune with the best trial's settings, whose training is found finished; the MLflow run's id."""
    name = f"{study.name}-best"
    known = [run for run in stored_runs(settings.tracking) if run.name == name]
    finished = next((run.id for run in known if run.status == "FINISHED"), None)
    stopped = next((run.id for run in known if run.status != "FINISHED"), None)
    chosen = settings.model_copy(update={"name": name, "train": best_settings})
    run_id = finished or finetune(chosen, stopped).finished.run.id
    with reopened(settings.tracking, run_id) as run:
        run.set_tags(
            {"optuna.study": study.name, "optuna.trial": best.number, "tunesmith.search_run": parent.id}
        )
    parent.set_tags({"tunesmith.best_run": run_id})
    study.remember(best_trial=best.number, best_run=run_id)
    return run_id


def _flow_run_name() -> str:
    resumed = prefect.runtime.flow_run.get_parameters().get("resumed")
    return str(resumed or given_settings().name or "search")
