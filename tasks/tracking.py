"""The MLflow run of a finetune: opened and closed here, written to by run id from anywhere.

One of the two places that import mlflow. Nothing uses MLflow's "active run": it is not visible in
other threads, where metrics would silently go to a new run.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config import CREDENTIALS, Settings, TrackingSettings, flatten
from tasks.home import runs_dir
from tasks.publish import StepOutput

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger(__name__)

EXPERIMENT_KIND, TRAINING = "mlflow.experimentKind", "custom_model_development"
"""The tag by which MLflow's UI opens an experiment with its training pages, not those for agents."""

CONTEXTS = {"train": "training", "valid": "validation", "test": "test"}
"""What MLflow calls a split's part in a run."""

ERROR, PROCESS = "tunesmith.error", "tunesmith.process"
"""Tags: how a run ended early; which process works on it."""

PAGE = 1000
"""Runs asked for at once."""

SEND_EVERY_S = 1.0
"""Points are sent together: SQLite takes 200 single writes a second and 12,000 in batches."""


@dataclass
class Run:
    """A handle on one MLflow run, good in any process or thread.

    Points given to `report` are sent in batches, at the latest by `flush`. A point that the run has
    already is left out: a training that goes on reports its history from the beginning.
    """

    id: str
    uri: str
    experiment_id: str
    _points: list[Metric] = field(default_factory=list, repr=False)
    _sent_at: float = field(default=0.0, repr=False)
    _known: set[tuple[str, int]] = field(default_factory=set, repr=False)

    @property
    def client(self) -> MlflowClient:
        """The client of this run's store."""
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record figures at a step; has the form of `tasks.train.loop.Report`."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        for name, value in metrics.items():
            if (name, step) not in self._known:
                self._known.add((name, step))
                self._points.append(Metric(name, value, now_ms, step))
        if time.monotonic() - self._sent_at > SEND_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Send what `report` has collected (MLflow takes 1,000 points a call)."""
        for start in range(0, len(self._points), 1000):
            self.client.log_batch(self.id, metrics=self._points[start : start + 1000])
        self._points.clear()
        self._sent_at = time.monotonic()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; MLflow refuses a value that differs from one logged before."""
        from mlflow.entities import Param

        pairs = [Param(key, str(value)) for key, value in params.items()]
        for start in range(0, len(pairs), 100):
            self.client.log_batch(self.id, params=pairs[start : start + 100])

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
    start together five crash otherwise (mlflow 3.17.2).
    """
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

    With `resumed`, the id of a run of these settings that ended early, that run is opened again.
    """
    client, uri, experiment_id = connect(settings.tracking)
    known = {"mlflow.source.name": "tunesmith", PROCESS: this_process(), **tags}
    if parent is not None:
        known["mlflow.parentRunId"] = parent.id
    if resumed:
        run = _opened_again(client, uri, resumed)
        run.set_tags(known)
    else:
        opened = client.create_run(experiment_id, tags=known, run_name=name)
        run = Run(opened.info.run_id, uri, experiment_id)
    status = "FINISHED"
    try:
        if not resumed:
            run.log_params(flatten(settings))
        yield run
    except BaseException as error:
        # Ctrl-C, exit and Prefect's termination signal are no Exceptions.
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        run.set_tags({ERROR: f"{type(error).__name__}: {error}"[:1000]})
        raise
    finally:
        run.flush()
        client.set_terminated(run.id, status)


def _opened_again(client: MlflowClient, uri: str, run_id: str) -> Run:
    """A run that ended early, RUNNING again, with the points that it has."""
    stored = client.get_run(run_id)
    run = Run(run_id, uri, stored.info.experiment_id)
    for name in stored.data.metrics:
        run._known |= {(name, point.step) for point in client.get_metric_history(run_id, name)}
    client.update_run(run_id, status="RUNNING")
    if ERROR in stored.data.tags:
        client.delete_tag(run_id, ERROR)
    return run


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


def read_text(settings: TrackingSettings, run_id: str, name: str) -> str | None:
    """The text of an artifact of a run; None when the run has no artifact of that name."""
    client, _, _ = connect(settings)
    if name not in {each.path for each in client.list_artifacts(run_id)}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")


def this_process() -> str:
    """This process in words that no other process, now or later, shares: host, id, time of its start."""
    import psutil

    return f"{platform.node()} {os.getpid()} {psutil.Process().create_time():.2f}"


def check_store(settings: TrackingSettings) -> str:
    """Write to the store and delete what was written; the store's address without credentials."""
    client, uri, experiment_id = connect(settings)
    probe = client.create_run(experiment_id, run_name="doctor")
    client.log_metric(probe.info.run_id, "probe", 1.0)
    client.delete_run(probe.info.run_id)
    return CREDENTIALS.sub("://***@", uri)
