"""How what waits in an outbox gets to its store: a database, or a tracking server."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config import CREDENTIALS
from tasks.errors import StepError
from tasks.outbox import SENDER, Ending, Point, RefusedError, Store

if TYPE_CHECKING:
    from mlflow import MlflowClient


ERROR, PROCESS = "tunesmith.error", "tunesmith.process"
"""Tags: how a run ended early; which process works on it."""

ANSWER_S = 30.0
"""In which a server has to answer a batch of points."""

NEVER = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes of what is refused for good: the run is not in this store, or was deleted.

The page of some other server on that port comes with none of them.
"""


def store_at(uri: str) -> Store:
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
        return address(self._uri)

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
        return address(self._uri)

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
        raise kind(CREDENTIALS.sub("://***@", first_line(error))) from error


def address(uri: str) -> str:
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


def first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if line.startswith("API request to ") and " failed with exception " in line:
        return line.rpartition(": ")[2].rstrip("\"')")  # of five nested messages the innermost says it
    return line
