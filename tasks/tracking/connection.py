"""The store: where it is, its experiment, and what earlier processes could not send to it."""

from __future__ import annotations

import logging
import os
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.config import CREDENTIALS, TrackingSettings
from tasks.home import runs_dir
from tasks.outbox import leftovers, take_over
from tasks.tracking.charts import VIEW_TAG, view
from tasks.tracking.senders import address, store_at

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


EXPERIMENT_KIND, TRAINING = "mlflow.experimentKind", "custom_model_development"
"""The tag by which MLflow's UI opens an experiment with its training pages, not those for agents."""

FLUSH_S = 30.0
"""So long the end of a run waits for the store to take its last points, and a start for those left over."""


def connect(settings: TrackingSettings) -> tuple[MlflowClient, str, str]:
    """A client of the store, its address and the experiment's id; store and experiment are made if new.

    The address is `tracking.uri`, else `MLFLOW_TRACKING_URI`, else SQLite under `mlruns/` with the
    artifacts beside it. A fresh database is migrated by one process at a time: of six that
    start together five crash otherwise (mlflow 3.17.2). What earlier processes could not send is sent first.
    """
    client, uri, experiment_id = _connected(settings)
    send_leftovers(uri)
    return client, uri, experiment_id


def send_leftovers(uri: str) -> None:
    """Send what earlier processes could not; nothing of it may keep a new run from starting.

    What belongs to this store, which has just answered, is waited for; what belongs to others is sent in
    the background for as long as this process lives, since they may be down.
    """
    deadline = time.monotonic() + FLUSH_S
    for left in leftovers(runs_dir() / "outbox"):
        ours = left.store == address(uri)
        if not ours and CREDENTIALS.search(left.store):
            _warn_of_other_store(left.path, left.run_id, left.store)
            continue
        try:
            outbox = take_over(left, store_at(uri if ours else left.store))
        except Exception as fault:
            log.warning("%s cannot be sent (%s); it is left as it is", left.path, fault)
            continue
        if outbox is None:
            continue
        log.info("sending what run %s left in %s", left.run_id, left.path)
        if not ours:
            outbox.close_later()
        elif not outbox.close(max(0.0, deadline - time.monotonic())):
            return


def _connected(settings: TrackingSettings) -> tuple[MlflowClient, str, str]:
    from filelock import FileLock
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = tracking_uri(settings)
    runs_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(runs_dir() / ".mlflow.lock"):
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(settings.experiment)
        if experiment is None:
            location = artifacts_location() if uri.startswith("sqlite") else None
            try:
                tags = {EXPERIMENT_KIND: TRAINING, VIEW_TAG: view()}
                return client, uri, client.create_experiment(settings.experiment, location, tags)
            except MlflowException:
                experiment = client.get_experiment_by_name(settings.experiment)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage == "active" and experiment.tags.get(VIEW_TAG) != view():
            client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, view())
    return client, uri, experiment.experiment_id


def tracking_uri(settings: TrackingSettings) -> str:
    """The MLflow store these settings mean."""
    return settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs_dir() / 'mlflow.db'}"


def artifacts_location() -> str:
    """Where artifacts of the default store lie, as a URI."""
    return (runs_dir() / "artifacts").as_uri()


@cache
def _warn_of_other_store(path: Path, run_id: str, store: str) -> None:
    """Once a process."""
    log.warning(
        "points of run %s wait in %s for %s, whose password is not kept: the next command with that "
        "store as MLFLOW_TRACKING_URI sends them",
        run_id,
        path,
        store,
    )


def check_store(settings: TrackingSettings) -> str:
    """Write to the store and delete what was written; the store's address without credentials."""
    client, uri, experiment_id = connect(settings)
    probe = client.create_run(experiment_id, run_name="doctor")
    client.log_metric(probe.info.run_id, "probe", 1.0)
    client.delete_run(probe.info.run_id)
    return CREDENTIALS.sub("://***@", uri)
