"""The MLflow run of a finetune: opened and closed here, written to by run id from anywhere.

Nothing uses MLflow's "active run": it is not visible in
other threads, where metrics would silently go to a new run. Metrics and the final status go through
the run's outbox (tasks/outbox.py), so that training never waits for the store; all else, which comes
before or after training, is a direct call.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.alive import this_process
from tasks.config import CREDENTIALS, Settings, TrackingSettings, flatten
from tasks.errors import InputError, StepError
from tasks.home import runs_dir
from tasks.outbox import Ending, Outbox, open_outbox
from tasks.publish import StepOutput
from tasks.tracking.connection import FLUSH_S, connect
from tasks.tracking.senders import ERROR, NEVER, PROCESS, address, first_line, store_at

if TYPE_CHECKING:
    from mlflow import MlflowClient


CONTEXTS = {"train": "training", "valid": "validation", "test": "test"}
"""What MLflow calls a split's part in a run."""

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
            f"run {run_id}: not in {address(uri)}, or deleted there; 'tunesmith ui' shows the runs, "
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
        f"MLflow at {address(uri)} failed: {first_line(error)}. Every step that was finished is kept under "
        f"{runs_dir() / 'steps'}: when the store answers again, the same command takes them from there, "
        f"and 'tunesmith resume {run_id}' goes on in the same run"
    )


def _outbox(run: Run) -> Outbox:
    """The outbox through which this process reports to a run."""
    key = (os.getpid(), run.id)
    with _opening:
        if key not in _outboxes:
            _outboxes[key] = open_outbox(runs_dir() / "outbox", run.id, store_at(run.uri))
        return _outboxes[key]
