"""The main flow: prepare → train → evaluate → fuse → register → report, in one MLflow run.

Run it as `tunesmith finetune CONFIG.yaml [section.key=value …]`.

Annotations here are real types, not text: Prefect (3.8.8) cannot resolve the text when a served
schedule loads the flow.
"""

from dataclasses import dataclass
from pathlib import Path

import prefect.runtime.flow_run
from prefect import flow
from prefect.states import Completed

from flows.flow_run import begin_flow_run, close_mlflow_runs, link_mlflow_run
from flows.live_progress import live_progress
from flows.notify import notify
from flows.resume import SETTINGS_FILE, settings_as_yaml
from flows.steps import and_what_follows, patiently, tell_steps
from tasks.config import Settings
from tasks.evaluate.task import evaluate
from tasks.fuse.task import fuse
from tasks.machine import machine_turn
from tasks.models.folder import ModelFolder
from tasks.models.task import import_model
from tasks.prepare.task import prepare
from tasks.publish import forcing
from tasks.register.task import register
from tasks.report.finished import Finished
from tasks.report.task import report
from tasks.system_metrics import system_metrics
from tasks.tracking import mlflow_run
from tasks.train.task import train


@dataclass(frozen=True)
class Outcome:
    """A finished run and its report page."""

    finished: Finished
    report: Path


@flow(
    name="finetune",
    flow_run_name=lambda: run_name(given_settings()),
    on_completion=[notify],
    on_failure=[close_mlflow_runs, notify],
    on_crashed=[close_mlflow_runs, notify],
    on_cancellation=[close_mlflow_runs, notify],
)
def finetune(settings: Settings, resumed: str | None = None, force: tuple[str, ...] = ()) -> Outcome:
    """Fine-tune a language model and keep everything that is learnt about it.

    `resumed` is the MLflow id of a run of these settings that ended early and is to be continued.
    `force` names steps that are done anew, with all that follows from them, though nothing has changed.
    """
    begin_flow_run(settings)
    with (
        live_progress(),
        forcing(and_what_follows(force)),
        mlflow_run(settings, run_name(settings), prefect_tags(), resumed=resumed) as run,
        system_metrics(run, run.started_ms()),
    ):
        link_mlflow_run(run.uri, run.experiment_id, run.id)
        if resumed is None:
            run.log_text(settings_as_yaml(settings), SETTINGS_FILE)
        step = patiently(settings.flow)
        model = step(import_model)(settings.model)
        data = step(prepare)(settings.data, model, run)
        with machine_turn(f"run {run_name(settings)} ({run.id[:8]})", settings.flow.when_busy):
            adapter = step(train)(settings.train, model, data, run)
            evaluation = step(evaluate)(settings.evaluate, model, adapter, data, run, settings.train)
            fused = step(fuse)(settings.fuse, model, adapter, data) if settings.fuse.enabled else None
        name = registered_name(settings, model)
        registration = (
            step(register)(settings, name, model, adapter, data, evaluation, run)
            if settings.register_.enabled
            else None
        )
        finished = Finished(
            run_name(settings), settings, model, data, adapter, evaluation, fused, registration, run
        )
        tell_steps(finished)
        outcome = Outcome(finished, report(finished))
        # Prefect shows the message beside the state of the run.
        return Completed(message=in_a_line(finished), data=outcome)  # type: ignore[return-value]


def run_name(settings: Settings) -> str:
    """`settings.name`, else what tells runs apart: data, layers, rank, learning rate."""
    train = settings.train
    layers = "all" if train.num_layers == -1 else train.num_layers
    source = Path(settings.data.source).stem
    return settings.name or f"{source}-layers{layers}-rank{train.rank}-lr{train.learning_rate:g}"


def in_a_line(finished: Finished) -> str:
    """What came out: the test loss of base and tuned, what was reused, where it stands in the registry."""
    figures = finished.evaluation.figures()
    told = [f"test loss {figures['base']['test_loss']:.4f} → {figures['tuned']['test_loss']:.4f}"]
    if finished.registration:
        alias = "@champion" if finished.registration.champion else "@challenger"
        told.append(f"{finished.registration.name} version {finished.registration.version} is {alias}")
    if reused := finished.reused():
        told.append(f"reused {', '.join(reused)}")
    return "; ".join(told)


def registered_name(settings: Settings, model: ModelFolder) -> str:
    """The registered model of this base and data, unless `register.name` says otherwise."""
    return settings.register_.name or f"{model.name}-{Path(settings.data.source).stem}"


def prefect_tags() -> dict[str, str]:
    """Tags that lead from the MLflow run to the Prefect flow run."""
    return {
        "prefect.flow_run_id": str(prefect.runtime.flow_run.get_id() or ""),
        "prefect.parent_flow_run_id": str(prefect.runtime.flow_run.get_parent_flow_run_id() or ""),
        "prefect.flow_run_name": str(prefect.runtime.flow_run.get_name() or ""),
    }


def given_settings() -> Settings:
    """The settings with which Prefect has started this flow run."""
    given = prefect.runtime.flow_run.get_parameters()["settings"]
    return given if isinstance(given, Settings) else Settings.model_validate(given)
