"""The MLflow UI: on loopback, and gone without a trace."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import optuna
import psutil
import pytest

from flows.cli import run
from flows.server import free_port
from flows.ui import _dashboard_command, open_ui
from tasks.config import TrackingSettings
from tasks.errors import StepError
from tasks.home import CHECKOUT
from tasks.tracking import connect

# A shell's background job ignores Ctrl-C; the process tested must not inherit that.
OPEN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from flows.ui import open_ui
open_ui(int(sys.argv[1]))
"""


@pytest.fixture
def ui(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The UI in a process of its own, on a port whose neighbour is taken, and its printed address."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port(47700)))
        other.listen()
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", OPEN, str(other.getsockname()[1])],
            env={**os.environ, "TUNESMITH_HOME": str(tmp_path), "PYTHONPATH": str(CHECKOUT)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        assert "used by another program" in process.stdout.readline()
        yield process, process.stdout.readline().removeprefix("MLflow UI:").strip()
        if process.poll() is None:
            process.terminate()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, -signal.SIGINT, marks=pytest.mark.slow)],
)
def test_the_ui_serves_loopback_only_and_leaves_no_process(
    ui: tuple[subprocess.Popen[str], str], number: signal.Signals, code: int
) -> None:
    process, address = ui
    with urllib.request.urlopen(address) as page:
        assert b"MLflow" in page.read()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(f"{address}/api/2.0", headers={"Host": "10.0.0.1"}))
    children = psutil.Process(process.pid).children(recursive=True)
    listening = [c.laddr.ip for p in children for c in p.net_connections("tcp4") if c.status == "LISTEN"]
    assert set(listening) == {"127.0.0.1"}
    process.send_signal(number)
    assert process.wait(15) == code
    assert not [child for child in children if child.is_running()]


@pytest.mark.slow
def test_all_three_uis_are_served_and_end_together(tmp_path: Path) -> None:
    pytest.importorskip("optuna_dashboard")
    home = {**os.environ, "TUNESMITH_HOME": str(tmp_path / "home"), "PREFECT_HOME": str(tmp_path / "prefect")}
    home |= {"PYTHONPATH": str(CHECKOUT)}
    (tmp_path / "home").mkdir()
    optuna.create_study(study_name="sums", storage=f"sqlite:///{tmp_path / 'home' / 'optuna.db'}")
    program = OPEN.replace("open_ui(int(sys.argv[1]))", "open_ui(int(sys.argv[1]), prefect=True)")
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", program, str(free_port(47720))],
        env=home, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        addresses = dict(process.stdout.readline().split(":", 1) for _ in range(3))
        assert addresses.keys() == {"MLflow UI", "Optuna", "Prefect UI"}
        for address in addresses.values():
            assert answers(address.strip())
        assert b"sums" in urllib.request.urlopen(f"{addresses['Optuna'].strip()}/api/studies").read()
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.terminate()
        process.communicate()
    assert process.returncode == 143
    assert not [child for child in children if child.is_running()]
    assert not (tmp_path / "home" / "server" / "state.json").exists(), "the Prefect server is down too"


def answers(address: str) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address) as page:
                return bool(page.status == 200)
        except urllib.error.URLError:
            time.sleep(0.2)
    return False


def test_without_a_study_there_is_no_dashboard(home: Path) -> None:
    assert _dashboard_command(5001) is None


def test_a_store_that_cannot_be_opened_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path))
    (tmp_path / "mlflow.db").write_text("not a database, certainly not\n" * 100, encoding="utf-8")
    with pytest.raises(StepError, match=r"did not come up(?s:.)*not a database"):
        open_ui(free_port(47800))


def test_a_tracking_server_is_only_pointed_at(capsys: pytest.CaptureFixture[str]) -> None:
    open_ui(uri="http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in capsys.readouterr().out


def test_the_ui_shows_what_an_earlier_process_could_not_send(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, uri, experiment = connect(TrackingSettings())
    stored = client.create_run(experiment).info.run_id
    left = [
        {"run": stored, "store": uri},
        {"time_ms": 1000, "step": 1, "metrics": {"train_loss": 1.0}},
    ]
    (home / "outbox").mkdir()
    (home / "outbox" / f"{stored}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in left))
    shown: list[float] = []
    monkeypatch.setattr(
        "flows.ui.open_ui", lambda *_, **__: shown.append(client.get_run(stored).data.metrics["train_loss"])
    )
    assert run(["ui"]) == 0
    assert shown == [1.0]
