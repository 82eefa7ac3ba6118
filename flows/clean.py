"""What a power cut has left RUNNING in MLflow, Prefect and Optuna, found and closed: `tunesmith clean`.

Every flow run, MLflow run and trial carries the process that works on it (host, id, time of its start).
Only where that very process is gone from this machine is anything closed; what runs elsewhere stays.
The first two are also looked for at the start of every flow, where they cost one question each.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tasks.alive import is_gone, this_process
from tasks.config import TrackingSettings
from tasks.leftovers import Closed, close_runs

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

log = logging.getLogger(__name__)

LABEL = "tunesmith.process"
"""Label of a flow run in Prefect: who works on it."""


@dataclass(frozen=True)
class Cleaned:
    """What was closed, by names."""

    mlflow: list[str] = field(default_factory=list)
    prefect: list[str] = field(default_factory=list)
    optuna: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A line for each system of which something was closed."""
        found = {"MLflow runs": self.mlflow, "Prefect flow runs": self.prefect, "Optuna trials": self.optuna}
        return [f"{what} closed: {', '.join(names)}" for what, names in found.items() if names]


def clean(tracking: TrackingSettings, trials: bool = True) -> Cleaned:
    """Close what dead processes have left RUNNING.

    Args:
        trials: look into all studies; else only for trials whose MLflow runs are closed here.
    """
    from search.leftovers import fail_trials

    runs = close_runs(tracking)
    known = [(run.study, run.trial) for run in runs if run.study is not None and run.trial is not None]
    failed = fail_trials(known) if trials or known else []
    return Cleaned([_named(run) for run in runs], close_flow_runs(), failed)


def close_flow_runs() -> list[str]:
    """Mark as Crashed the flow runs, and their task runs, whose processes are gone; their names."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    at_work = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING])
    with get_client(sync_client=True) as client:
        running = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=at_work)), limit=200
        )
        dead = [run for run in running if is_gone(str(run.labels.get(LABEL, "")))]
        for run in dead:
            _crash(client, run)
    return [run.name for run in dead]


def sign_flow_run(flow_run_id: str) -> None:
    """Write this process on its flow run, by which it is known as dead some day."""
    from uuid import UUID

    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(UUID(flow_run_id), {LABEL: this_process()})


def _crash(client: SyncPrefectClient, run: FlowRun) -> None:
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterId,
        TaskRunFilter,
        TaskRunFilterState,
        TaskRunFilterStateType,
    )
    from prefect.client.schemas.objects import State, StateType
    from prefect.states import Crashed

    told = f"its process is gone ({run.labels[LABEL]}): killed, or a power cut"
    gone: State[None] = Crashed(message=told)
    unfinished = TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    tasks = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=unfinished)),
    )
    for task in tasks:
        client.set_task_run_state(task.id, gone, force=True)
    client.set_flow_run_state(run.id, gone, force=True)


def _named(run: Closed) -> str:
    return f"{run.name} ({run.run_id[:8]})"
