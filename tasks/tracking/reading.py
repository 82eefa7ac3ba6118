"""What the store knows of runs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.config import TrackingSettings
from tasks.home import cache_dir
from tasks.publish import publishing
from tasks.tracking.connection import connect
from tasks.tracking.run import Run
from tasks.tracking.senders import NEVER, PROCESS

PAGE = 1000
"""Runs asked for at once."""


@dataclass(frozen=True)
class StoredRun:
    """What the store says of a run.

    Attributes:
        status: RUNNING, FINISHED, FAILED or KILLED; a run killed with -9 stays RUNNING.
        process: of `this_process`, where it ran last; empty when unknown.
    """

    id: str
    name: str
    status: str
    process: str


def stored_runs(settings: TrackingSettings) -> list[StoredRun]:
    """All runs of all experiments, newest first."""
    client, _, _ = connect(settings)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs: list[StoredRun] = []
    token: str | None = None
    while True:
        page = client.search_runs(experiments, page_token=token, max_results=PAGE)
        for run in page:
            process = run.data.tags.get(PROCESS, "")
            runs.append(StoredRun(run.info.run_id, run.info.run_name or "", run.info.status, process))
        token = page.token
        if not token:
            return runs


def newest_run_with(settings: TrackingSettings, tags: Mapping[str, str]) -> StoredRun | None:
    """The newest finished run of the experiment with these tags."""
    client, _, experiment = connect(settings)
    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    found = client.search_runs([experiment], f"{wanted} and attributes.status = 'FINISHED'", max_results=1)
    for run in found:
        info = run.info
        return StoredRun(info.run_id, info.run_name or "", info.status, run.data.tags.get(PROCESS, ""))
    return None


@dataclass(frozen=True)
class NestedRun:
    """A run under a parent run."""

    id: str
    status: str
    tags: Mapping[str, str]


def nested_runs(parent: Run) -> list[NestedRun]:
    """The runs under `parent`, oldest first."""
    found = f"tags.`mlflow.parentRunId` = '{parent.id}'"
    runs: list[NestedRun] = []
    token: str | None = None
    while True:
        page = parent.client.search_runs(
            [parent.experiment_id],
            found,
            order_by=["attributes.start_time ASC"],
            page_token=token,
            max_results=PAGE,
        )
        runs += [NestedRun(run.info.run_id, run.info.status, dict(run.data.tags)) for run in page]
        token = page.token
        if not token:
            return runs


def end_run(run: Run, status: str) -> None:
    """Give a run that a killed process has left RUNNING a status."""
    run.client.set_terminated(run.id, status)


@dataclass(frozen=True)
class Record:
    """What a run has left in the store: settings as text, the last value of each figure, tags."""

    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


def read_record(settings: TrackingSettings, run_id: str) -> Record:
    """The params, figures and tags of a run."""
    client, _, _ = connect(settings)
    data = client.get_run(run_id).data
    return Record(dict(data.params), dict(data.metrics), dict(data.tags))


def read_text(settings: TrackingSettings, run_id: str, name: str) -> str | None:
    """The text of an artifact of a run; None when the run has no artifact of that name."""
    client, _, _ = connect(settings)
    if name not in {each.path for each in client.list_artifacts(run_id)}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")


def read_folder(settings: TrackingSettings, run_id: str, name: str) -> Path | None:
    """The folder `name` of a run's artifacts: where it lies, or from elsewhere fetched once into the cache.

    None when there is no such run, or it has no such folder.
    """
    from urllib.parse import unquote, urlparse

    from mlflow.exceptions import MlflowException

    client, _, _ = connect(settings)
    try:
        if not client.list_artifacts(run_id, name):
            return None
    except MlflowException as error:
        if error.error_code in NEVER:
            return None
        raise
    place = urlparse(str(client.get_run(run_id).info.artifact_uri))
    if place.scheme in ("", "file"):
        return Path(unquote(place.path)) / name
    target = cache_dir() / "artifacts" / run_id / name
    if not target.is_dir():
        with publishing(target) as draft, tempfile.TemporaryDirectory() as fetched:
            shutil.copytree(client.download_artifacts(run_id, name, fetched), draft, dirs_exist_ok=True)
    return target
