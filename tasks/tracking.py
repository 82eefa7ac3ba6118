"""The MLflow run of a finetune: opened and closed here, written to by run id from anywhere.

One of the two places that import mlflow. Nothing uses MLflow's "active run": it is not visible in
other threads, where metrics would silently go to a new run. Metrics and the final status go through
the run's outbox (tasks/outbox.py), so that training never waits for the store; all else, which comes
before or after training, is a direct call.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.alive import this_process
from tasks.config import CREDENTIALS, Settings, TrackingSettings, flatten
from tasks.errors import InputError, StepError
from tasks.home import cache_dir, runs_dir
from tasks.outbox import (
    SENDER,
    Ending,
    Outbox,
    Point,
    RefusedError,
    Store,
    leftovers,
    open_outbox,
    take_over,
)
from tasks.publish import StepOutput, publishing

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

EXPERIMENT_KIND, TRAINING = "mlflow.experimentKind", "custom_model_development"
"""The tag by which MLflow's UI opens an experiment with its training pages, not those for agents."""

CONTEXTS = {"train": "training", "valid": "validation", "test": "test"}
"""What MLflow calls a split's part in a run."""

ERROR, PROCESS = "tunesmith.error", "tunesmith.process"
"""Tags: how a run ended early; which process works on it."""

PAGE = 1000
"""Runs asked for at once."""

FLUSH_S = 30.0
"""So long the end of a run waits for the store to take its last points, and a start for those left over."""

ANSWER_S = 30.0
"""In which a server has to answer a batch of points."""

NEVER = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes of what is refused for good: the run is not in this store, or was deleted.

The page of some other server on that port comes with none of them.
"""

_outboxes: dict[tuple[int, str], Outbox] = {}
"""By process and run. Not in `Run`, which Prefect copies and other processes are given."""

_opening = threading.Lock()


@dataclass(frozen=True)
class Run:
    """A handle on one MLflow run, good in any process or thread."""

    id: str
    uri: str
    experiment_id: str

    @property
    def client(self) -> MlflowClient:
        """The client of this run's store."""
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record figures at a step; has the form of `tasks.train.loop.Report`, and never waits.

        A point that the run has already is left out: a training that goes on reports its history from
        the beginning.
        """
        _outbox(self).report(step, metrics)

    def flush(self) -> bool:
        """Wait up to `FLUSH_S` until MLflow has all that was reported; whether it has."""
        return _outbox(self).flush(FLUSH_S)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; MLflow refuses a value that differs from one logged before."""
        from mlflow.entities import Param

        pairs = [Param(key, str(value)) for key, value in params.items()]
        for start in range(0, len(pairs), 100):
            self.client.log_batch(self.id, params=pairs[start : start + 100])

    def started_ms(self) -> int:
        """When it was first opened, since 1970."""
        return int(self.client.get_run(self.id).info.start_time)

    def tag(self, name: str) -> str | None:
        """The value of a tag; None when it is not set."""
        value: str | None = self.client.get_run(self.id).data.tags.get(name)
        return value

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; values become text."""
        from mlflow.entities import RunTag

        self.client.log_batch(self.id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def log_text(self, text: str, name: str) -> None:
        """Store `text` as the artifact `name`."""
        self.client.log_text(self.id, text, name)

    def log_files(self, folder: Path, artifact_path: str, only: Sequence[str] | None = None) -> None:
        """Store the files of a folder, or only those named, under `artifact_path` of the run."""
        for path in sorted(folder.iterdir()):
            if path.is_file() and (only is None or path.name in only):
                self.client.log_artifact(self.id, str(path), artifact_path)

    def log_dataset(self, output: StepOutput, report: Mapping[str, Any]) -> None:
        """Record prepared data as inputs of the run: a dataset a split, with its rows and tokens.

        The digest is the split and the data's fingerprint (22 of the 36 characters MLflow takes): MLflow
        3.17 keeps one of several inputs of the same name and digest, and would drop two splits.

        Args:
            output: prepared data, with `<split>.jsonl` of each split.
            report: its data report; `source` and `splits` are read.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

        inputs = []
        for split, size in report["splits"].items():
            dataset = Dataset(
                name=report["source"],
                digest=f"{output.fingerprint}-{split}",
                source_type="local",
                source=json.dumps({"uri": str(output.path / f"{split}.jsonl")}),
                profile=json.dumps(
                    {key: size[key] for key in ("rows", "tokens", "supervised_tokens", "supervised_share")}
                ),
            )
            inputs.append(DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, CONTEXTS[split])]))
        self.client.log_inputs(self.id, inputs)

    def log_table(self, rows: Mapping[str, Sequence[Any]], name: str) -> None:
        """Store columns as an MLflow table, which its UI shows and compares over runs."""
        self.client.log_table(self.id, dict(rows), name)


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
        ours = left.store == _address(uri)
        if not ours and CREDENTIALS.search(left.store):
            _warn_of_other_store(left.path, left.run_id, left.store)
            continue
        try:
            outbox = take_over(left, _store(uri if ours else left.store))
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
                made = client.create_experiment(settings.experiment, location, {EXPERIMENT_KIND: TRAINING})
                return client, uri, made
            except MlflowException:
                experiment = client.get_experiment_by_name(settings.experiment)
                if experiment is None:
                    raise
    return client, uri, experiment.experiment_id


def tracking_uri(settings: TrackingSettings) -> str:
    """The MLflow store these settings mean."""
    return settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs_dir() / 'mlflow.db'}"


def artifacts_location() -> str:
    """Where artifacts of the default store lie, as a URI."""
    return (runs_dir() / "artifacts").as_uri()


@contextmanager
def mlflow_run(
    settings: Settings,
    name: str,
    tags: Mapping[str, str],
    parent: Run | None = None,
    resumed: str | None = None,
) -> Iterator[Run]:
    """Open a run with the settings as params; close it FINISHED, FAILED, or KILLED when interrupted.

    With `resumed`, the id of a run of these settings that ended early, that run is opened again. When
    the store cannot be reached at the end, last points and status stay in the outbox.

    Raises:
        StepError: a direct call on the run failed in the store, and the store's client gave up.
    """
    from mlflow.exceptions import MlflowException

    client, uri, experiment_id = connect(settings.tracking)
    process = this_process()
    known = {"mlflow.source.name": "tunesmith", PROCESS: process, **tags}
    if parent is not None:
        known["mlflow.parentRunId"] = parent.id
    if resumed:
        run = _opened_again(client, uri, resumed)
        run.set_tags(known)
    else:
        opened = client.create_run(experiment_id, tags=known, run_name=name)
        run = Run(opened.info.run_id, uri, experiment_id)
    outbox = _outbox(run)
    status, fault = "FINISHED", None
    try:
        if not resumed:
            run.log_params(flatten(settings))
        yield run
    except BaseException as error:
        # Ctrl-C, exit and Prefect's termination signal are no Exceptions.
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        fault = CREDENTIALS.sub("://***@", f"{type(error).__name__}: {error}"[:1000])
        # In a nested run it stays as it is: a store that is down ends the search, not only a trial.
        if isinstance(error, MlflowException) and parent is None:
            raise StepError(_store_failed(uri, run.id, error)) from error
        raise
    finally:
        _outboxes.pop((os.getpid(), run.id), None)
        outbox.end(Ending(status, int(time.time() * 1000), process, fault))
        outbox.close(FLUSH_S)


def _opened_again(client: MlflowClient, uri: str, run_id: str) -> Run:
    """A run that ended early, RUNNING again, with the points that it has."""
    stored = client.get_run(run_id)
    run = Run(run_id, uri, stored.info.experiment_id)
    for name in stored.data.metrics:
        _outbox(run).know((name, point.step) for point in client.get_metric_history(run_id, name))
    client.update_run(run_id, status="RUNNING")
    if ERROR in stored.data.tags:
        client.delete_tag(run_id, ERROR)
    return run


@contextmanager
def reopened(settings: TrackingSettings, run_id: str) -> Iterator[Run]:
    """A run that may have ended, to add figures and tags to; its status stays as it is.

    At the end of the block the store has what was reported, or it waits in the outbox.

    Raises:
        InputError: the store has no such run, or it was deleted there.
    """
    from mlflow.exceptions import MlflowException

    client, uri, _ = connect(settings)
    try:
        stored = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in NEVER:
            raise StepError(_store_failed(uri, run_id, error)) from error
        stored = None
    if stored is None or stored.info.lifecycle_stage != "active":
        raise InputError(
            f"run {run_id}: not in {_address(uri)}, or deleted there; 'tunesmith ui' shows the runs, "
            "MLFLOW_TRACKING_URI names another store"
        )
    run = Run(run_id, uri, stored.info.experiment_id)
    try:
        yield run
    finally:
        if outbox := _outboxes.pop((os.getpid(), run_id), None):
            outbox.close(FLUSH_S)


def _store_failed(uri: str, run_id: str, error: Exception) -> str:
    return (
        f"MLflow at {_address(uri)} failed: {_first_line(error)}. Every step that was finished is kept under "
        f"{runs_dir() / 'steps'}: when the store answers again, the same command takes them from there, "
        f"and 'tunesmith resume {run_id}' goes on in the same run"
    )


def _outbox(run: Run) -> Outbox:
    """The outbox through which this process reports to a run."""
    key = (os.getpid(), run.id)
    with _opening:
        if key not in _outboxes:
            _outboxes[key] = open_outbox(runs_dir() / "outbox", run.id, _store(run.uri))
        return _outboxes[key]


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


def _store(uri: str) -> Store:
    """A store as an outbox sees it."""
    return _Server(uri) if uri.startswith(("http://", "https://")) else _Database(uri)


class _Database:
    """Any store through MLflow's client, which is made in the thread that uses it."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._client: MlflowClient | None = None
        logging.getLogger("mlflow.store.db.utils").addFilter(_not_from_a_sender)

    @property
    def address(self) -> str:
        return _address(self._uri)

    def take_points(self, run_id: str, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(point.name, point.value, point.time_ms, point.step) for point in points]
        with self._reached() as client:
            client.log_batch(run_id, metrics=metrics)

    def take_ending(self, run_id: str, ending: Ending) -> None:
        with self._reached() as client:
            if client.get_run(run_id).data.tags.get(PROCESS) != ending.process:
                return  # another process has resumed it
            if ending.error:
                client.set_tag(run_id, ERROR, ending.error)
            client.set_terminated(run_id, ending.status, ending.time_ms)

    @contextmanager
    def _reached(self) -> Iterator[MlflowClient]:
        """The client, which would make an empty database in the place of one that is gone."""
        from mlflow import MlflowClient

        with _told_in_a_line():
            if (database := _sqlite_file(self._uri)) and not database.exists():
                raise FileNotFoundError(f"{database} is gone")
            self._client = self._client or MlflowClient(self._uri)
            yield self._client


class _Server:
    """A tracking server through MLflow's REST API, one try a call.

    The client (mlflow 3.17) tries for four minutes, asleep for up to two of them, and cannot be told not
    to but for all calls of the process: its sleeps would outlast the outage and the end of the run.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri

    @property
    def address(self) -> str:
        return _address(self._uri)

    def take_points(self, run_id: str, points: Sequence[Point]) -> None:
        metrics = [
            {
                "key": point.name,
                "value": _in_json(point.value),
                "timestamp": point.time_ms,
                "step": point.step,
            }
            for point in points
        ]
        self._call("POST", "log-batch", json={"run_id": run_id, "metrics": metrics})

    def take_ending(self, run_id: str, ending: Ending) -> None:
        stored = self._call("GET", "get", params={"run_id": run_id})["run"]["data"]
        if {"key": PROCESS, "value": ending.process} not in stored.get("tags", []):
            return  # another process has resumed it
        if ending.error:
            self._call("POST", "set-tag", json={"run_id": run_id, "key": ERROR, "value": ending.error})
        how = {"status": ending.status, "end_time": ending.time_ms}
        self._call("POST", "update", json={"run_id": run_id, **how})

    def _call(self, method: str, name: str, **body: Mapping[str, Any]) -> Any:
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request, verify_rest_response

        endpoint = f"/api/2.0/mlflow/runs/{name}"
        how: dict[str, Any] = {"max_retries": 0, "timeout": ANSWER_S, "raise_on_status": False, **body}
        with _told_in_a_line():
            credentials = get_default_host_creds(self._uri)  # type: ignore[no-untyped-call]
            answer = http_request(credentials, endpoint, method, **how)  # type: ignore[no-untyped-call]
            return verify_rest_response(answer, endpoint).json()


def _in_json(value: float) -> float | str:
    """As MLflow's REST API takes it."""
    return value if math.isfinite(value) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")


@contextmanager
def _told_in_a_line() -> Iterator[None]:
    """Turn what goes wrong into `RefusedError` or `StepError`, a line without credentials."""
    try:
        yield
    except Exception as error:
        kind = RefusedError if getattr(error, "error_code", "") in NEVER else StepError
        raise kind(CREDENTIALS.sub("://***@", _first_line(error))) from error


def _address(uri: str) -> str:
    """What a store is known by: its URI without credentials, and the same from any working directory."""
    if database := _sqlite_file(uri):
        return f"sqlite:///{database.resolve()}"
    return CREDENTIALS.sub("://***@", uri).rstrip("/")


def _sqlite_file(uri: str) -> Path | None:
    scheme, found, path = uri.partition(":///")
    return Path(path.partition("?")[0]) if found and scheme.startswith("sqlite") and path else None


def _not_from_a_sender(record: logging.LogRecord) -> bool:
    """MLflow (3.17) logs the traceback of a locked database; the outbox says it in a line."""
    return not (record.threadName or "").startswith(SENDER)


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if line.startswith("API request to ") and " failed with exception " in line:
        return line.rpartition(": ")[2].rstrip("\"')")  # of five nested messages the innermost says it
    return line


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


def check_store(settings: TrackingSettings) -> str:
    """Write to the store and delete what was written; the store's address without credentials."""
    client, uri, experiment_id = connect(settings)
    probe = client.create_run(experiment_id, run_name="doctor")
    client.log_metric(probe.info.run_id, "probe", 1.0)
    client.delete_run(probe.info.run_id)
    return CREDENTIALS.sub("://***@", uri)
