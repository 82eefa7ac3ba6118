"""`tunesmith ui`: the pages of MLflow, Prefect and Optuna over what is on this machine, on loopback."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from flows.server import LOOPBACK, down, free_port, running_server, up
from tasks.errors import StepError
from tasks.home import runs_dir
from tasks.progress import Bar, progress
from tasks.tracking import address_of_view

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0


def open_ui(
    port: int = 5000,
    uri: str | None = None,
    artifacts: str | None = None,
    prefect: bool = False,
    experiment_id: str | None = None,
) -> None:
    """Serve MLflow's UI, and Optuna's dashboard where it is installed, until Ctrl-C or SIGTERM.

    No process is left behind, but a Prefect server that was up before.

    Args:
        port: on loopback; when something else listens there, the next free one is taken.
        uri: the tracking store; SQLite under `mlruns/` by default. The address of an MLflow server is
            only printed: it has its own UI.
        artifacts: where a new experiment's artifacts go (path or URI); `mlruns/artifacts` by default.
        prefect: start the local Prefect server, if it is not up, for as long.
        experiment_id: whose curves to point at.

    Raises:
        StepError: a UI did not come up or ended by itself; with the last lines of its log.
        KeyboardInterrupt: after Ctrl-C.
        SystemExit: with 143 after SIGTERM.
    """
    uri = uri or f"sqlite:///{runs_dir() / 'mlflow.db'}"
    if uri.startswith(("http://", "https://")):
        print(f"MLflow runs elsewhere: {uri}")
        return
    chosen = _free_port(port)
    artifacts = artifacts or (runs_dir() / "artifacts").as_uri()
    with ExitStack() as stack:
        stack.enter_context(_sigterm_is_an_exit())
        server = stack.enter_context(_served("mlflow-ui", _mlflow_command(chosen, uri, artifacts)))
        with progress("starting the MLflow UI") as bar:
            _wait_until_healthy(bar, server, chosen)
        address = f"http://{LOOPBACK}:{chosen}"
        print(f"MLflow UI:  {address}", flush=True)
        if experiment_id is not None:
            print(f"  curves of all runs, best first: {address_of_view(address, experiment_id)}")
        if dashboard := _dashboard_command(chosen + 1):
            stack.enter_context(_served("optuna-dashboard", dashboard.command))
            print(f"Optuna:     http://{LOOPBACK}:{dashboard.port}")
        if prefect_address := stack.enter_context(_prefect(prefect)):
            print(f"Prefect UI: {prefect_address}")
        print("Ctrl-C ends it.", flush=True)
        server.wait()
        raise StepError(f"the MLflow UI ended by itself with code {server.returncode}; {_last_words()}")


@dataclass(frozen=True)
class _Command:
    command: list[str]
    port: int


def _free_port(port: int) -> int:
    chosen = free_port(port)
    if chosen != port:
        log.warning("port %d is used by another program; taking %d", port, chosen)
    return chosen


def _mlflow_command(port: int, uri: str, artifacts: str) -> list[str]:
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", LOOPBACK, "--port", str(port), "--backend-store-uri", uri]
    command += ["--no-serve-artifacts", "--default-artifact-root", artifacts]
    # MLflow would take any private-network name for its own.
    return [*command, "--allowed-hosts", f"{LOOPBACK}:{port},localhost:{port}"]


def _dashboard_command(port: int) -> _Command | None:
    """How Optuna's dashboard is served; None where it is not installed, or there is no study."""
    studies = runs_dir() / "optuna.db"
    if importlib.util.find_spec("optuna_dashboard") is None or not studies.exists():
        return None
    chosen = free_port(port)
    program = "from optuna_dashboard._cli import main; main()"
    options = [f"sqlite:///{studies}", "--host", LOOPBACK, "--port", str(chosen)]
    return _Command([sys.executable, "-c", program, *options], chosen)


@contextmanager
def _prefect(start: bool) -> Iterator[str | None]:
    """The address of the local Prefect server; one that is started here ends with the block."""
    state = running_server()
    if state is not None or not start:
        yield state.url if state else None
        return
    try:
        yield up().url
    finally:
        down()


@contextmanager
def _served(name: str, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    # Unless told otherwise MLflow starts fifteen processes of 3 GB for jobs nobody gives it here.
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with _log_file(name).open("wb") as output:
        server = subprocess.Popen(
            command,
            env={**os.environ, **quiet},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield server
        finally:
            _end_group(server)


def _end_group(server: subprocess.Popen[bytes]) -> None:
    """End the server and what it started: its uvicorn outlives it otherwise (mlflow 3.17.2)."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline and _group_lives(server):
            time.sleep(0.05)
    server.wait()


def _group_lives(server: subprocess.Popen[bytes]) -> bool:
    server.poll()
    try:
        os.killpg(server.pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def _sigterm_is_an_exit() -> Iterator[None]:
    def leave(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_until_healthy(bar: Bar, server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        if _answers(port):
            return
        time.sleep(0.1)
        bar.advance(0.1)
    raise StepError(f"the MLflow UI did not come up; {_last_words()}")


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _last_words() -> str:
    lines = _log_file().read_text(encoding="utf-8", errors="replace").splitlines()
    return f"its log {_log_file()} ends with\n  " + "\n  ".join(lines[-8:])


def _log_file(name: str = "mlflow-ui") -> Path:
    folder = runs_dir() / "server"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.log"
