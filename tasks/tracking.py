"""The MLflow run of a finetune: opened and closed here, written to by run id from anywhere.

One of the two places that import mlflow. Nothing uses MLflow's "active run": it is not visible in
other threads, where metrics would silently go to a new run.
"""

from __future__ import annotations

import json
import logging
import os
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

SEND_EVERY_S = 1.0
"""Points are sent together: SQLite takes 200 single writes a second and 12,000 in batches."""


@dataclass
class Run:
    """A handle on one MLflow run, good in any process or thread.

    Points given to `report` are sent in batches, at the latest by `flush`.
    """

    id: str
    uri: str
    experiment_id: str
    _points: list[Metric] = field(default_factory=list, repr=False)
    _sent_at: float = field(default=0.0, repr=False)

    @property
    def client(self) -> MlflowClient:
        """The client of this run's store."""
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record figures at a step; has the form of `tasks.train.loop.Report`."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._points += [Metric(name, value, now_ms, step) for name, value in metrics.items()]
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

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; values become text."""
        from mlflow.entities import RunTag

        self.client.log_batch(self.id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

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
    settings: Settings, name: str, tags: Mapping[str, str], parent: Run | None = None
) -> Iterator[Run]:
    """Open a run with the settings as params; close it FINISHED, FAILED, or KILLED when interrupted."""
    client, uri, experiment_id = connect(settings.tracking)
    known = {"mlflow.source.name": "tunesmith", **tags}
    if parent is not None:
        known["mlflow.parentRunId"] = parent.id
    opened = client.create_run(experiment_id, tags=known, run_name=name)
    run = Run(opened.info.run_id, uri, experiment_id)
    status = "FINISHED"
    try:
        run.log_params(flatten(settings))
        yield run
    except BaseException as error:
        # Ctrl-C, exit and Prefect's termination signal are no Exceptions.
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        run.set_tags({"tunesmith.error": f"{type(error).__name__}: {error}"[:1000]})
        raise
    finally:
        run.flush()
        client.set_terminated(run.id, status)


def check_store(settings: TrackingSettings) -> str:
    """Write to the store and delete what was written; the store's address without credentials."""
    client, uri, experiment_id = connect(settings)
    probe = client.create_run(experiment_id, run_name="doctor")
    client.log_metric(probe.info.run_id, "probe", 1.0)
    client.delete_run(probe.info.run_id)
    return CREDENTIALS.sub("://***@", uri)
