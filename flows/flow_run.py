"""What every flow run does at its start, and when it ends in another way than it should.

The hooks' arguments are named as Prefect calls them: workers pass them by keyword.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from flows.prefect_environment import log_our_steps
from tasks.config import Settings, TrackingSettings

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun, State

log = logging.getLogger(__name__)

LINK = "mlflow-run"
"""Under this key Prefect's UI keeps the way to the MLflow run."""

UI = "http://127.0.0.1:5000"
"""Where `tunesmith ui` serves MLflow, unless told otherwise."""


def begin_flow_run(settings: Settings) -> None:
    """Let our log lines through to Prefect, sign the flow run, and close what a power cut has left.

    None of it keeps a run from starting.
    """
    import prefect.runtime.flow_run

    from flows.clean import clean, sign_flow_run

    log_our_steps()
    flow_run = prefect.runtime.flow_run.get_id()
    if flow_run is None:
        return
    try:
        sign_flow_run(flow_run)
        for line in clean(settings.tracking, trials=False).lines():
            log.warning("%s: their processes were killed, or there was a power cut", line)
    except Exception as error:
        log.warning("what an earlier run has left was not looked for: %s: %s", type(error).__name__, error)


def link_mlflow_run(uri: str, experiment_id: str, run_id: str) -> None:
    """Put the way from the flow run to its MLflow run beside it: an artifact, and labels."""
    from uuid import UUID

    import prefect.runtime.flow_run
    from prefect.artifacts import create_link_artifact
    from prefect.client.orchestration import get_client

    flow_run = prefect.runtime.flow_run.get_id()
    if flow_run is None:
        return
    served = uri.startswith(("http://", "https://"))
    address = f"{uri.rstrip('/') if served else UI}/#/experiments/{experiment_id}/runs/{run_id}"
    told = "curves, settings and files" + ("" if served else ", while 'tunesmith ui' is up")
    try:
        create_link_artifact(address, f"MLflow run {run_id[:8]}", LINK, told)
        with get_client(sync_client=True) as client:
            labels: dict[str, bool | int | float | str] = {
                "mlflow.run_id": run_id,
                "mlflow.experiment_id": experiment_id,
            }
            client.update_flow_run_labels(UUID(flow_run), labels)
    except Exception as error:
        log.warning("the MLflow run is not linked in Prefect: %s: %s", type(error).__name__, error)


def close_mlflow_runs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook: mark the MLflow runs of a flow run KILLED whose process is gone and could not do it itself."""
    from tasks.leftovers import close_runs

    for run in close_runs(_tracking(flow_run), str(flow_run.id)):
        log.warning(
            "%s ended as %s: MLflow run %s is marked as killed", flow_run.name, state.name, run.run_id
        )


def _tracking(flow_run: FlowRun) -> TrackingSettings:
    given: Any = flow_run.parameters.get("settings", {})
    return (given if isinstance(given, Settings) else Settings.model_validate(given)).tracking
