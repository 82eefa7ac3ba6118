"""MLflow runs that a power cut or a kill -9 has left RUNNING: found by their dead processes, and closed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from tasks.alive import is_gone
from tasks.config import TrackingSettings
from tasks.tracking import ERROR, PROCESS, connect

log = logging.getLogger(__name__)

FLOW_RUN, PARENT_FLOW_RUN = "prefect.flow_run_id", "prefect.parent_flow_run_id"
"""Tags: the flow run that a run belongs to, and the one that has called that."""

MOST_AT_ONCE = 1000


@dataclass(frozen=True)
class Closed:
    """A run that was closed; `study` and `trial` are Optuna's where it was a trial."""

    run_id: str
    name: str
    study: str | None
    trial: int | None


def close_runs(settings: TrackingSettings, flow_run: str | None = None) -> list[Closed]:
    """Mark as KILLED what says RUNNING though its process on this machine is gone.

    What runs on other machines, or says nothing of its process, is left as it is.

    Args:
        flow_run: only runs of this Prefect flow run.
    """
    client, _, _ = connect(settings)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    running = client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=MOST_AT_ONCE)
    closed = []
    for run in running:
        tags = run.data.tags
        if flow_run is not None and flow_run not in (tags.get(FLOW_RUN), tags.get(PARENT_FLOW_RUN)):
            continue
        process = tags.get(PROCESS, "")
        if not is_gone(process):
            continue
        client.set_tag(run.info.run_id, ERROR, f"its process is gone ({process}): killed, or a power cut")
        client.set_terminated(run.info.run_id, "KILLED", _last_sign_ms(client, run))
        trial = tags.get("optuna.trial", "")
        number = int(trial) if trial.isdecimal() else None
        closed.append(Closed(run.info.run_id, run.info.run_name or "", tags.get("optuna.study"), number))
    return closed


def _last_sign_ms(client: Any, run: Any) -> int:
    """When a run was last heard of, which is about when it was killed."""
    known = [name for name in ("train_loss", "val_loss") if name in run.data.metrics]
    times = [point.timestamp for name in known for point in client.get_metric_history(run.info.run_id, name)]
    return int(max([run.info.start_time, *times]))
