"""The local Prefect server: up, found, kept up, and gone again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from flows import server
from flows.server import ServerState, down, free_port, running_server, up, use_running_server
from tasks.errors import StepError


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, prefect_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_HOME", str(prefect_home))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    yield tmp_path
    down()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the supervisor run a script of a few lines in place of Prefect."""

    def use(script: str) -> None:
        supervisor = (
            "import subprocess, sys; from flows import server\n"
            f"command = [sys.executable, '-c', {script!r}, sys.argv[1]]\n"
            "server._start_server = lambda port: subprocess.Popen(command)\n"
            "sys.exit(server.supervise(int(sys.argv[1])))"
        )

        def start(port: int) -> subprocess.Popen[bytes]:
            with (server._folder() / "server.log").open("wb") as output:
                return subprocess.Popen(
                    [sys.executable, "-c", supervisor, str(port)],
                    env={**os.environ, "PYTHONPATH": str(Path(server.__file__).parent.parent)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

        monkeypatch.setattr(server, "_start_supervisor", start)

    return use


HEALTHY = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


@pytest.mark.slow
def test_up_serves_prefect_to_loopback_and_its_own_pages_until_down_and_leaves_no_process(home: Path) -> None:
    state = up(free_port(47000))
    with urllib.request.urlopen(f"{state.api_url}/health") as answer:
        assert answer.read() == b"true"
    assert running_server() == state
    assert header_for_another_site(state) is None
    processes = [psutil.Process(state.pid), *psutil.Process(state.pid).children(recursive=True)]
    listening = [c.laddr.ip for p in processes for c in p.net_connections() if c.status == "LISTEN"]
    assert set(listening) == {"127.0.0.1"}
    assert down()
    assert not any(process.is_running() for process in processes)
    assert running_server() is None
    assert not down()


def header_for_another_site(state: ServerState) -> str | None:
    request = urllib.request.Request(
        f"{state.api_url}/health", headers={"Origin": "http://elsewhere.example"}
    )
    with urllib.request.urlopen(request) as answer:
        header: str | None = answer.headers["Access-Control-Allow-Origin"]
        return header


def test_a_second_up_finds_the_first_server(
    home: Path, stand_in: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flows")
    stand_in(HEALTHY)
    first = up(free_port(47100))
    assert up() == first
    assert "up already" in caplog.text


def test_two_ups_at_the_same_time_start_one_server(
    home: Path, stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(HEALTHY)
    start, started = server._start_supervisor, []

    def count(port: int) -> subprocess.Popen[bytes]:
        started.append(start(port))
        return started[-1]

    monkeypatch.setattr(server, "_start_supervisor", count)
    with ThreadPoolExecutor(4) as pool:
        states = list(pool.map(lambda _: up(47150), range(4)))
    for supervisor in started[1:]:
        supervisor.terminate()
    assert {state.pid for state in states} == {supervisor.pid for supervisor in started}


def test_a_taken_port_is_left_alone(
    home: Path, stand_in: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(HEALTHY)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert up(taken).port != taken
        assert f"port {taken} is used by another program" in caplog.text


def test_a_server_that_dies_is_started_again(home: Path, stand_in: Callable[[str], None]) -> None:
    stand_in(HEALTHY)
    first = up(free_port(47200))
    psutil.Process(first.server_pid).kill()
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        state = running_server()
        if state and state.server_pid != first.server_pid:
            break
        time.sleep(0.05)
    assert state is not None
    assert (state.pid, state.deaths) == (first.pid, 1)


def test_up_waits_for_a_server_that_is_being_started_again(
    home: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in(f"import time; time.sleep(0.7){HEALTHY}")
    first = up(free_port(47250))
    psutil.Process(first.server_pid).kill()
    time.sleep(0.3)
    second = up(first.port)
    assert (second.pid, second.deaths) == (first.pid, 1)


def test_a_server_that_cannot_start_gives_its_last_words(home: Path, stand_in: Callable[[str], None]) -> None:
    stand_in("raise SystemExit('database is locked')")
    with pytest.raises(StepError, match="database is locked"):
        up(free_port(47300))
    assert running_server() is None


def test_a_server_that_outlived_its_supervisor_is_ended_by_the_next_up(
    home: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in(HEALTHY)
    first = up(free_port(47400))
    orphan = psutil.Process(first.server_pid)
    supervisor = psutil.Process(first.pid)
    supervisor.kill()
    psutil.wait_procs([supervisor], timeout=10)  # a signal takes a moment
    second = up(first.port)
    assert second.port == first.port
    gone, _ = psutil.wait_procs([orphan], timeout=10)  # whoever adopted it may take a moment to bury it
    assert gone


def test_a_recycled_process_number_is_never_ended(home: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
        born = psutil.Process(stranger.pid).create_time()
        state = ServerState(
            stranger.pid, born - 100, stranger.pid, born - 100, 1, "http://127.0.0.1:1", "then"
        )
        server._write_state(state)
        assert not down()
        assert stranger.poll() is None
        assert not server._state_file().exists()
        server._write_state(replace(state, created=born))
        assert down()


def test_a_damaged_state_file_counts_as_no_server(home: Path) -> None:
    server._write_state(ServerState(1, 0, 1, 0, 1, "", ""))
    server._state_file().write_text('{"pid": ', encoding="utf-8")
    assert running_server() is None
    server._state_file().write_text(json.dumps({"pid": 1}), encoding="utf-8")
    assert running_server() is None


@pytest.fixture
def living(home: Path) -> Iterator[ServerState]:
    """A state that names this very process, and a listening port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        me = psutil.Process()
        url = f"http://127.0.0.1:{port}"
        state = ServerState(me.pid, me.create_time(), me.pid, me.create_time(), port, url, "now")
        server._write_state(state)
        yield state
        server._state_file().unlink()


def test_flows_find_the_local_server(living: ServerState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "")
    assert use_running_server()
    assert os.environ["PREFECT_API_URL"] == living.api_url


def test_an_api_of_ones_own_choice_wins(living: ServerState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert not use_running_server()
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:9/api"


def test_an_api_in_the_active_profile_wins(
    living: ServerState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = 'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://127.0.0.1:9/api"\n'
    (tmp_path / "profiles.toml").write_text(profile, encoding="utf-8")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert not use_running_server()
    assert "PREFECT_API_URL" not in os.environ


def test_a_port_nobody_answers_on_is_no_server(living: ServerState) -> None:
    server._write_state(replace(living, port=free_port(47500)))
    assert running_server() is None
    assert not use_running_server()
