"""MLflow runs: every point arrives whatever the store does, the status says how the run ended."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from tasks import outbox, tracking
from tasks.config import Settings, TrackingSettings
from tasks.errors import StepError
from tasks.home import CHECKOUT
from tasks.tracking import (
    PROCESS,
    Run,
    charts,
    check_store,
    connect,
    connection,
    mlflow_run,
    read_text,
    reading,
    senders,
    stored_runs,
    tracking_uri,
)


def wait_at_most(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """For a store to take last points."""
    for module in (connection, tracking.run):
        monkeypatch.setattr(module, "FLUSH_S", seconds)


PATIENCE_S = 60.0


pytestmark = pytest.mark.usefixtures("store")


def curve(run_id: str, name: str = "train_loss", uri: str | None = None) -> list[tuple[int, float]]:
    client, _, _ = connect(TrackingSettings(uri=uri))
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def until(true: Callable[[], object]) -> None:
    """Wait for something outside this thread, far longer than it can need."""
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


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
    for name in ("first", "second", "third"):
        with mlflow_run(Settings(), name, {}):
            pass
    monkeypatch.setattr(reading, "PAGE", 2)
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


def test_a_run_may_be_given_to_another_process_while_it_is_open() -> None:
    with mlflow_run(Settings(), "a run", {}) as run:
        run.report(1, {"train_loss": 1.0})
        assert pickle.loads(pickle.dumps(run)) == run


def test_a_trial_that_ends_leaves_its_search_open(home: Path) -> None:
    with mlflow_run(Settings(), "search", {}) as parent:
        with mlflow_run(Settings(), "trial", {}, parent) as trial:
            trial.report(1, {"train_loss": 1.0})
            parent.report(1, {"train_loss": 10.0})
        parent.report(2, {"train_loss": 20.0})
    assert curve(trial.id) == [(1, 1.0)]
    assert curve(parent.id) == [(1, 10.0), (2, 20.0)]
    assert not list((home / "outbox").glob("*.jsonl"))


def leave(home: Path, run: Run, lines: list[dict[str, Any]], store: str | None = None) -> Path:
    """What a process that was killed leaves of a run."""
    folder = home / "outbox"
    folder.mkdir(exist_ok=True)
    path = folder / f"{run.id}.jsonl"
    head = {"run": run.id, "store": store or run.uri}
    path.write_text("".join(json.dumps(each) + "\n" for each in [head, *lines]))
    return path


def reported(step: int, value: float) -> dict[str, Any]:
    return {"time_ms": 1000 + step, "step": step, "metrics": {"train_loss": value}}


def run_of_a_dead_process(name: str = "a run") -> Run:
    """Still RUNNING, and it has its first point."""
    client, uri, experiment = connect(TrackingSettings())
    made = client.create_run(experiment, tags={PROCESS: "here 1 2.0"}, run_name=name)
    client.log_metric(made.info.run_id, "train_loss", 1.0, 1001, 1)
    return Run(made.info.run_id, uri, experiment)


def test_what_a_dead_process_left_is_sent_once_by_the_next_that_connects(home: Path) -> None:
    run = run_of_a_dead_process()
    ending = {"status": "FAILED", "time_ms": 5000, "process": "here 1 2.0", "error": "OSError: é"}
    path = leave(home, run, [reported(1, 1.0), reported(2, 2.0), ending])
    client, _, _ = connect(TrackingSettings())
    stored = client.get_run(run.id)
    assert curve(run.id) == [(1, 1.0), (2, 2.0)]
    assert (stored.info.status, stored.info.end_time) == ("FAILED", 5000)
    assert stored.data.tags["tunesmith.error"] == "OSError: é"
    assert not path.exists()


def test_a_resumed_run_has_the_points_of_its_dead_process_once(home: Path) -> None:
    run = run_of_a_dead_process()
    leave(home, run, [reported(1, 1.0), reported(2, 2.0)])
    with mlflow_run(Settings(), "a run", {}, resumed=run.id) as again:
        for step in (1, 2, 3):
            again.report(step, {"train_loss": step / 10})
    assert curve(run.id) == [(1, 1.0), (2, 2.0), (3, 0.3)]


def test_the_late_status_of_a_dead_process_does_not_end_a_run_that_was_resumed(home: Path) -> None:
    run = run_of_a_dead_process()
    ending = {"status": "KILLED", "time_ms": 5000, "process": "elsewhere 9 9.0", "error": "late"}
    leave(home, run, [reported(2, 2.0), ending])
    client, _, _ = connect(TrackingSettings())
    assert curve(run.id) == [(1, 1.0), (2, 2.0)]
    assert client.get_run(run.id).info.status == "RUNNING"
    assert "tunesmith.error" not in client.get_run(run.id).data.tags


def test_what_is_left_for_another_store_goes_there_and_nowhere_else(home: Path, tmp_path: Path) -> None:
    run = run_of_a_dead_process()
    path = leave(home, run, [reported(2, 2.0)])
    other = f"sqlite:///{tmp_path}/other.db"
    with mlflow_run(Settings(tracking=TrackingSettings(uri=other)), "elsewhere", {}):
        until(lambda: not path.exists())
    assert curve(run.id) == [(1, 1.0), (2, 2.0)]
    assert [each.name for each in stored_runs(TrackingSettings(uri=other))] == ["elsewhere"]


def test_a_store_that_is_gone_is_not_made_anew_and_keeps_no_run_from_starting(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of_a_dead_process()
    gone = tmp_path / "gone.db"
    path = leave(home, run, [reported(2, 2.0)], f"sqlite:///{gone}")
    with mlflow_run(Settings(), "a run", {}) as other:
        other.report(1, {"train_loss": 1.0})
        until(lambda: "gone.db is gone" in caplog.text)
    assert path.exists()
    assert not gone.exists()
    assert curve(other.id) == [(1, 1.0)]


def test_an_outbox_that_cannot_be_read_keeps_no_run_from_starting(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = leave(home, run_of_a_dead_process(), [{"sent": "much"}, reported(2, 2.0)])
    connect(TrackingSettings())
    assert f"{path} cannot be sent" in caplog.text
    assert path.exists()


def test_the_points_of_a_deleted_run_are_set_aside(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of_a_dead_process()
    leave(home, run, [reported(2, 2.0)])
    run.client.delete_run(run.id)
    for _ in range(2):
        connect(TrackingSettings())
    assert caplog.text.count("must be in the 'active' state") == 1
    assert [path.suffix for path in (home / "outbox").glob(f"{run.id}*")] == [".refused"]


SECRET = "http://me:secret@127.0.0.1:9"


def test_no_password_reaches_the_outbox_or_a_message(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_at_most(monkeypatch, 0.1)
    run = Run("0a1b", SECRET, "0")
    run.report(1, {"train_loss": 1.0})
    assert not run.flush()
    text = (home / "outbox" / "0a1b.jsonl").read_text()
    assert json.loads(text.splitlines()[0])["store"] == "http://***@127.0.0.1:9"
    until(lambda: "http://***@127.0.0.1:9 cannot be written to ([Errno " in caplog.text)
    assert "refused): training goes on" in caplog.text
    assert "secret" not in text + caplog.text


def test_no_password_in_an_error_of_the_store_is_told() -> None:
    with (
        pytest.raises(StepError, match=r"^no route to http://\*\*\*@host$"),
        senders._told_in_a_line(),
    ):
        raise OSError("no route to http://me:secret@host\nand more")


def test_what_needs_a_password_is_left_with_one_warning(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = leave(home, Run("0a1b", SECRET, "0"), [reported(1, 1.0)], "http://***@127.0.0.1:9")
    for _ in range(2):
        connect(TrackingSettings())
    assert caplog.text.count("whose password is not kept") == 1
    assert path.exists()


@contextmanager
def outage(home: Path) -> Iterator[None]:
    """The database is not where it was."""
    database, away = home / "mlflow.db", home / "away.db"
    database.rename(away)
    try:
        yield
    finally:
        away.rename(database)


def test_an_outage_in_mid_training_loses_nothing(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "SEND_EVERY_S", 0.01)
    with mlflow_run(Settings(), "a run", {}) as run:
        run.report(0, {"train_loss": 0.0})
        assert run.flush()
        with outage(home):
            for step in range(1, 50):
                run.report(step, {"train_loss": float(step)})
            until(lambda: "training goes on" in caplog.text)
    assert curve(run.id) == [(step, float(step)) for step in range(50)]
    assert run.client.get_run(run.id).info.status == "FINISHED"
    assert caplog.text.count("training goes on") == 1


def test_a_store_that_is_down_at_the_end_fails_no_run_and_gets_points_and_status_later(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_at_most(monkeypatch, 0.1)
    monkeypatch.setattr(outbox, "LONGEST_PAUSE_S", 0.1)
    with ExitStack() as down:
        with mlflow_run(Settings(), "a run", {}) as run:
            run.report(1, {"train_loss": 1.0})
            down.enter_context(outage(home))
        [path] = (home / "outbox").glob("*.jsonl")
        assert f"the rest waits in {path}" in caplog.text
        assert "Traceback" not in caplog.text
    until(lambda: not path.exists())
    assert curve(run.id) == [(1, 1.0)]
    assert run.client.get_run(run.id).info.status == "FINISHED"


def test_an_error_is_not_hidden_by_a_store_that_is_down(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_at_most(monkeypatch, 0.1)
    monkeypatch.setattr(outbox, "LONGEST_PAUSE_S", 0.1)

    def work(down: ExitStack) -> None:
        with mlflow_run(Settings(), "a run", {}):
            down.enter_context(outage(home))
            raise RuntimeError("the real one")

    with ExitStack() as down:
        with pytest.raises(RuntimeError, match="the real one"):
            work(down)
        [path] = (home / "outbox").glob("*.jsonl")
    until(lambda: not path.exists())
    client, _, experiment = connect(TrackingSettings())
    [stored] = client.search_runs([experiment])
    assert stored.info.status == "FAILED"
    assert stored.data.tags["tunesmith.error"] == "RuntimeError: the real one"


def test_a_call_that_fails_in_the_store_is_explained_and_nothing_finished_is_lost() -> None:
    with (
        pytest.raises(StepError, match=r"MLflow at sqlite:.* failed: no answer\. .*'tunesmith resume"),
        mlflow_run(Settings(), "a run", {}) as run,
    ):
        raise MlflowException("no answer\nand many lines")
    assert run.client.get_run(run.id).info.status == "FAILED"


def test_a_trial_whose_store_fails_is_no_failed_trial_among_others() -> None:
    """A search goes on after a StepError, and would try the next trial in the same store."""
    with (
        mlflow_run(Settings(), "search", {}) as parent,
        pytest.raises(MlflowException),
        mlflow_run(Settings(), "trial", {}, parent),
    ):
        raise MlflowException("no answer")


@pytest.mark.parametrize("locked_s", [1.0, pytest.param(25.0, marks=pytest.mark.slow)])
def test_a_locked_database_loses_nothing(
    home: Path, locked_s: float, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "SEND_EVERY_S", 0.01)
    wait_at_most(monkeypatch, PATIENCE_S)
    with mlflow_run(Settings(), "a run", {}) as run:
        run.report(0, {"train_loss": 0.0})
        assert run.flush()
        with closing(sqlite3.connect(home / "mlflow.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            for step in range(1, 500):
                run.report(step, {"train_loss": float(step)})
            time.sleep(locked_s)
            assert other.in_transaction, "locked all the time"
            other.execute("ROLLBACK")
    assert curve(run.id) == [(step, float(step)) for step in range(500)]
    assert "Traceback" not in capfd.readouterr().err, "MLflow prints one after 20 s"


@contextmanager
def web_server(status: int, page: str) -> Iterator[str]:
    """Something that answers everything with this page; its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


@pytest.mark.parametrize(
    ("status", "page", "suffix"),
    [
        (404, "<h1>Not found</h1>", ".jsonl"),
        (400, "<h1>Bad request</h1>", ".jsonl"),
        (503, '{"error_code": "RESOURCE_EXHAUSTED"}', ".jsonl"),
        (403, '{"error_code": "PERMISSION_DENIED", "message": "no"}', ".jsonl"),
        (404, '{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}', ".refused"),
    ],
)
def test_points_are_set_aside_only_when_mlflow_itself_says_that_the_run_is_not_there(
    home: Path, status: int, page: str, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    with web_server(status, page) as uri:
        Run(f"run-{status}-{len(page)}", uri, "0").report(1, {"train_loss": 1.0})
        until(lambda: caplog.records)
    files = {path.suffix for path in (home / "outbox").glob("run-*")}
    assert files - {".lock"} == {suffix}


class Server:
    """A real MLflow server on loopback that can be killed and started again with the same runs."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        database, artifacts = f"sqlite:///{folder}/server.db", (folder / "artifacts").as_uri()
        self._command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
        self._command += ["--backend-store-uri", database, "--artifacts-destination", artifacts]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._process = subprocess.Popen(
            self._command,
            env={**os.environ, **quiet},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = time.monotonic() + 120
        while not self.answers():
            assert self._process.poll() is None, "the server ended"
            assert time.monotonic() < end
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """The whole group of this process: killed alone, its uvicorn would go on serving."""
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_in_mid_training_has_every_point_once(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tasks.outbox")
    with mlflow_run(Settings(tracking=TrackingSettings(uri=server.uri)), "a run", {}) as run:
        steps = iter(range(100_000))

        def some(count: int) -> None:
            for step in (next(steps) for _ in range(count)):
                run.report(step, {"train_loss": float(step), "grad_norm": math.nan if step % 2 else math.inf})

        some(500)
        until(lambda: run.client.get_metric_history(run.id, "train_loss"))
        some(700)  # on their way, or not yet, when it dies
        server.kill()
        some(500)
        until(lambda: "training goes on" in caplog.text)
        some(500)
        assert not server.answers(), "down all the time, and no report has waited for it"
        server.start()
        some(500)
    assert curve(run.id, uri=server.uri) == [(step, float(step)) for step in range(2700)]
    assert len(curve(run.id, "grad_norm", server.uri)) == 2700
    assert run.client.get_run(run.id).info.status == "FINISHED"
    assert caplog.text.count("training goes on") == caplog.text.count("takes points again") == 1


TRAINING = """
import sys
from tasks import tracking
from tasks.config import Settings, TrackingSettings

tracking.run.FLUSH_S = 1.0
with tracking.mlflow_run(Settings(tracking=TrackingSettings(uri=sys.argv[1])), "a run", {}) as run:
    for step in range(10_000):
        run.report(step, {"train_loss": float(step)})
        print(step, run.id, flush=True)
        if step % 200 == 199 and not sys.stdin.readline():
            break
"""


def start_training(uri: str) -> subprocess.Popen[str]:
    """A process that waits for a line on its input after each 200 steps, and ends with it."""
    return subprocess.Popen(
        [sys.executable, "-c", TRAINING, uri],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_server_that_is_down_when_training_ends_gets_all_from_the_next_process(server: Server) -> None:
    with start_training(server.uri) as training:
        assert training.stdout
        lines = [training.stdout.readline() for _ in range(200)]
        server.kill()
        _, errors = training.communicate(timeout=PATIENCE_S)
    assert training.returncode == 0
    assert "Traceback" not in errors
    assert "the rest waits in" in errors
    server.start()
    run_id = lines[-1].split()[1]
    assert curve(run_id, uri=server.uri) == [(step, float(step)) for step in range(200)]
    [stored] = stored_runs(TrackingSettings(uri=server.uri))
    assert stored.status == "FINISHED"


@pytest.mark.slow
def test_after_kill_9_every_point_is_in_mlflow_exactly_once(home: Path) -> None:
    uri = f"sqlite:///{home}/mlflow.db"
    connect(TrackingSettings())
    for delay_s in (0.0, 0.3, 0.7, 1.02, 1.1, 1.6):  # the first points are sent after a second
        with start_training(uri) as training:
            assert training.stdin
            assert training.stdout
            first = training.stdout.readline()
            training.stdin.write("\n" * 50)
            training.stdin.flush()
            time.sleep(delay_s)
            training.kill()
            last = [first, *training.stdout.read().splitlines(keepends=True)]
        steps = [int(line.split()[0]) for line in last if line.endswith("\n")]
        points = curve(first.split()[1], uri=uri)
        assert points[: len(steps)] == [(step, float(step)) for step in steps]
        assert len(points) <= len(steps) + 1, "one may have been reported and not said"
    assert not list((home / "outbox").glob("*.jsonl"))


FORKED = """
import os
from tasks.config import Settings
from tasks.tracking import mlflow_run

with mlflow_run(Settings(), "a run", {}) as run:
    run.report(1, {"train_loss": 1.0})
    child = os.fork()
    if not child:
        run.report(2, {"train_loss": 2.0})
        os._exit(0)
    os.waitpid(child, 0)
    run.report(3, {"train_loss": 3.0})
    print(run.id)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="forks are not safe there")
def test_a_forked_process_reports_through_a_file_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(curve(done.stdout.strip())) == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.slow
def test_processes_at_once_send_their_own_and_share_what_a_dead_one_left(home: Path) -> None:
    left = run_of_a_dead_process()
    path = leave(home, left, [reported(step, float(step)) for step in range(1, 3000)])
    uri = f"sqlite:///{home}/mlflow.db"
    crowd = [start_training(uri) for _ in range(3)]
    runs = []
    for training in crowd:
        output, errors = training.communicate("\n", timeout=PATIENCE_S)
        assert training.returncode == 0, errors
        assert "cannot be written to" not in errors
        runs.append(output.split()[1])
    for run_id in runs:
        assert curve(run_id) == [(step, float(step)) for step in range(400)]
    assert curve(left.id) == [(step, float(step)) for step in range(1, 3000)]
    assert not path.exists()


def test_the_experiment_has_a_view_of_charts_and_one_from_before_gets_it() -> None:
    client, _, experiment_id = connect(TrackingSettings())
    assert client.get_experiment(experiment_id).tags[charts.VIEW_TAG] == charts.view()
    client.set_experiment_tag(experiment_id, charts.VIEW_TAG, "of an earlier version")
    connect(TrackingSettings())
    assert client.get_experiment(experiment_id).tags[charts.VIEW_TAG] == charts.view()
    shown = json.loads(charts.view())
    sections = {section["uuid"] for section in shown["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in shown["compareRunCharts"]} == sections


def test_the_runs_of_a_store_are_read_though_the_experiment_was_deleted() -> None:
    client, _, experiment_id = connect(TrackingSettings())
    client.set_experiment_tag(experiment_id, charts.VIEW_TAG, "of an earlier version")
    client.delete_experiment(experiment_id)
    assert stored_runs(TrackingSettings()) == []
