"""MLflow runs: every point arrives, the status says how the run ended, a fresh store survives a crowd."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tasks.config import Settings, TrackingSettings
from tasks.tracking import check_store, connect, mlflow_run, read_text, stored_runs, tracking_uri


def test_every_point_and_param_arrives_although_points_are_sent_in_batches() -> None:
    with mlflow_run(Settings(), "a run", {"prefect.flow_run_id": "7"}) as run:
        for step in range(2500):
            run.report(step, {"train_loss": 1 / (step + 1)})
    stored = run.client.get_run(run.id)
    assert len(run.client.get_metric_history(run.id, "train_loss")) == 2500
    assert stored.data.params["train.learning_rate"] == "0.0002"
    assert stored.data.tags["prefect.flow_run_id"] == "7"
    assert stored.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_a_run_that_ends_early_keeps_its_points_and_says_how_it_ended(
    error: type[BaseException], status: str
) -> None:
    def work() -> None:
        with mlflow_run(Settings(), "a run", {}) as opened:
            opened.report(0, {"first": 1.0})
            opened.report(1, {"last": 2.0})
            raise error

    with pytest.raises(error):
        work()
    client, _, experiment = connect(TrackingSettings())
    [stored] = client.search_runs([experiment])
    assert stored.info.status == status
    assert stored.data.tags["tunesmith.error"].startswith(error.__name__)
    assert stored.data.metrics == {"first": 1.0, "last": 2.0}


def test_a_point_that_is_reported_again_is_stored_once() -> None:
    with mlflow_run(Settings(), "a run", {}) as run:
        for _ in range(2):
            run.report(1, {"train_loss": 2.0})
            run.flush()
    assert len(run.client.get_metric_history(run.id, "train_loss")) == 1


def test_a_run_that_is_resumed_is_running_again_keeps_its_points_and_ends_anew() -> None:
    def stop() -> None:
        with mlflow_run(Settings(), "a run", {}) as opened:
            opened.report(1, {"train_loss": 3.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    client, _, experiment = connect(TrackingSettings())
    [stored] = client.search_runs([experiment])
    with mlflow_run(Settings(), "a run", {"prefect.flow_run_id": "8"}, resumed=stored.info.run_id) as run:
        assert client.get_run(run.id).info.status == "RUNNING"
        for step in (1, 2):
            run.report(step, {"train_loss": 4.0 - step})
    [resumed] = client.search_runs([experiment])
    assert resumed.info.status == "FINISHED"
    assert "tunesmith.error" not in resumed.data.tags
    assert resumed.data.tags["prefect.flow_run_id"] == "8"
    points = client.get_metric_history(run.id, "train_loss")
    assert [(point.step, point.value) for point in points] == [(1, 3.0), (2, 2.0)]


def test_all_runs_are_listed_page_after_page(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import tracking

    for name in ("first", "second", "third"):
        with mlflow_run(Settings(), name, {}):
            pass
    monkeypatch.setattr(tracking, "PAGE", 2)
    assert [run.name for run in stored_runs(TrackingSettings())] == ["third", "second", "first"]


def test_a_text_of_a_run_is_read_back_and_a_missing_one_is_none() -> None:
    with mlflow_run(Settings(), "a run", {}) as run:
        run.log_text("é: 1\n", "notes.yaml")
    assert read_text(TrackingSettings(), run.id, "notes.yaml") == "é: 1\n"
    assert read_text(TrackingSettings(), run.id, "none.yaml") is None


def test_trials_are_nested_in_their_search() -> None:
    with (
        mlflow_run(Settings(), "search", {}) as parent,
        mlflow_run(Settings(), "trial", {}, parent) as trial,
    ):
        assert trial.client.get_run(trial.id).data.tags["mlflow.parentRunId"] == parent.id


def test_the_store_is_the_setting_then_the_environment_then_sqlite_at_home(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri(TrackingSettings()) == f"sqlite:///{home}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5999")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert tracking_uri(TrackingSettings()) == "http://127.0.0.1:5999"
    assert TrackingSettings().experiment == "mine"
    assert tracking_uri(TrackingSettings(uri="sqlite:///x.db")) == "sqlite:///x.db"


def test_artifacts_lie_beside_the_database(home: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter.txt").write_text("weights")
    with mlflow_run(Settings(), "a run", {}) as run:
        run.log_files(tmp_path, "adapter")
    assert [path.name for path in (home / "artifacts").rglob("adapter.txt")] == ["adapter.txt"]


def test_checking_the_store_leaves_no_run_behind() -> None:
    assert check_store(TrackingSettings()).startswith("sqlite:///")
    client, _, experiment = connect(TrackingSettings())
    assert client.search_runs([experiment]) == []


@pytest.mark.slow
def test_six_processes_may_open_a_fresh_store_at_the_same_time() -> None:
    program = "from tasks.tracking import *; connect(TrackingSettings())"
    crowd = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(6)]
    assert [process.wait() for process in crowd] == [0] * 6
