"""A local Prefect server that outlives the command: `tunesmith up` and `tunesmith down`.

The server runs under a supervisor, a process of its own session that starts it again when it dies.
Both log to `mlruns/server/server.log`; who they are stands in `mlruns/server/state.json`, with the
times at which they were created, so that a process number given to somebody else is never ended.
The supervisor runs as `python -m flows.server supervise PORT`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import StepError
from tasks.home import CHECKOUT, runs_dir
from tasks.progress import Bar, progress

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 180.0  # 12 s on a fresh home, 3 s later, measured on two idle cores
STOP_TIMEOUT_S = 15.0
LONGEST_BACKOFF_S = 30.0
HEALTHY_AFTER_S = 60.0
MOST_QUICK_DEATHS = 6


@dataclass(frozen=True)
class ServerState:
    """Who serves Prefect on this machine; times of creation in seconds since 1970."""

    pid: int
    created: float
    server_pid: int
    server_created: float
    port: int
    url: str
    started: str
    deaths: int = 0

    @property
    def api_url(self) -> str:
        """What PREFECT_API_URL has to be."""
        return f"{self.url}/api"


def up(port: int = 4200) -> ServerState:
    """Start the local Prefect server, or find it up already, and say which.

    Safe against a second `up` at the same moment: it waits and then finds the first one's server.

    Args:
        port: on loopback; when something else listens there, the next free one is taken.

    Raises:
        StepError: the server did not come up; the message ends with the last lines of its log.
    """
    with _only_one():
        known = _supervised()
        if known is None:
            _clean_up_after_a_dead_supervisor()
            chosen = free_port(port)
            if chosen != port:
                log.warning("port %d is used by another program; taking %d", port, chosen)
            supervisor = _start_supervisor(chosen)
            with progress("starting the Prefect server") as bar:
                return _wait_until_healthy(bar, supervisor)
        with progress("waiting for the Prefect server") as bar:
            state = _wait_until_healthy(bar, None)
        log.info("the Prefect server is up already, since %s", known.started)
        return state


def down() -> bool:
    """End the local Prefect server and its supervisor; False when there was none.

    Both get SIGTERM and 15 seconds; then these very processes are killed.
    """
    with _only_one():
        return _end()


def running_server() -> ServerState | None:
    """The local server if its supervisor lives and its port answers; takes milliseconds."""
    state = _supervised()
    return state if state and _answers(state.port) else None


def use_running_server() -> bool:
    """Let Prefect in this process use the local server when one is up. Call before importing Prefect.

    A person's own choice of an API, in the environment or in Prefect's active profile, wins.

    Returns:
        Whether this process will talk to the local server.
    """
    if _person_chose_an_api():
        return False
    state = running_server()
    if state is None:
        return False
    os.environ["PREFECT_API_URL"] = state.api_url
    return True


def free_port(preferred: int, tries: int = 50) -> int:
    """The first port from `preferred` on that nothing on loopback listens on.

    Raises:
        StepError: none of the `tries` ports is free.
    """
    for port in range(preferred, min(preferred + tries, 65536)):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind((LOOPBACK, port))
                return port
    raise StepError(f"no free port from {preferred} on within {tries}; give another one with --port")


def supervise(port: int) -> int:
    """Keep a Prefect server on `port` until SIGTERM; start it again, ever later, when it dies.

    Returns:
        0 after SIGTERM, 1 when the server died six times in a row within a minute of its start.
    """
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    deaths = 0
    while True:
        server = _start_server(port)
        _write_state(_state_of(server.pid, port, deaths))
        began = time.monotonic()
        while not stopping and server.poll() is None:
            time.sleep(0.1)
        if stopping:
            _end_child(server)
            return 0
        deaths = 1 if time.monotonic() - began > HEALTHY_AFTER_S else deaths + 1
        print(f"the Prefect server ended with code {server.returncode}, {deaths} in a row", flush=True)
        if deaths >= MOST_QUICK_DEATHS:
            return 1
        resume_at = time.monotonic() + min(2.0 ** (deaths - 1), LONGEST_BACKOFF_S)
        while not stopping and time.monotonic() < resume_at:
            time.sleep(0.1)


def _folder() -> Path:
    folder = runs_dir() / "server"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _only_one() -> Iterator[None]:
    with (_folder() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start_supervisor(port: int) -> subprocess.Popen[bytes]:
    file = _log_file()
    if file.exists():
        file.replace(file.with_suffix(".log.1"))
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    with file.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.server", "supervise", str(port)],
            env={**os.environ, "PYTHONPATH": path},
            cwd=_folder(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _start_server(port: int) -> subprocess.Popen[bytes]:
    url = f"http://{LOOPBACK}:{port}"
    settings = {
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_UI_API_URL": f"{url}/api",
        "PREFECT_SERVER_API_HOST": LOOPBACK,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Prefect's default lets a page of any site read and change everything.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{url},http://localhost:{port}",
    }
    command = ["-m", "prefect", "server", "start", "--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    return subprocess.Popen([sys.executable, *command], env={**os.environ, **settings})


def _wait_until_healthy(bar: Bar, supervisor: subprocess.Popen[bytes] | None) -> ServerState:
    """Wait for a server just started, whose first death is an error, or (None) for one kept up already."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        state = _supervised()
        if state and _healthy(state):
            return state
        if supervisor is None:
            gave_up = state is None
        else:
            gave_up = supervisor.poll() is not None or (state is not None and state.deaths > 0)
        if gave_up:
            break
        time.sleep(0.1)
        bar.advance(0.1)
    _end()
    file = _log_file()
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    last = "\n  ".join(lines[-8:])
    raise StepError(f"the Prefect server did not come up; its log {file} ends with\n  {last}")


def _healthy(state: ServerState) -> bool:
    try:
        with urllib.request.urlopen(f"{state.api_url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _answers(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.03)
        return probe.connect_ex((LOOPBACK, port)) == 0


def _supervised() -> ServerState | None:
    state = _read_state()
    return state if state and _process(state.pid, state.created) else None


def _clean_up_after_a_dead_supervisor() -> None:
    state = _read_state()
    if state and (server := _process(state.server_pid, state.server_created)):
        _terminate([server])
    _state_file().unlink(missing_ok=True)


def _end() -> bool:
    import psutil

    state = _read_state()
    if state is None:
        return False
    supervisor = _process(state.pid, state.created)
    server = _process(state.server_pid, state.server_created)
    ours = [process for process in (supervisor, server) if process is not None]
    if supervisor is not None:
        with suppress(psutil.NoSuchProcess):
            ours += [child for child in supervisor.children(recursive=True) if child not in ours]
    _terminate(ours)
    _state_file().unlink(missing_ok=True)
    return bool(ours)


def _terminate(processes: list[psutil.Process]) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def _process(pid: int, created: float) -> psutil.Process | None:
    """The living process `pid` if it is the one created then, to two seconds (the clock may be set)."""
    import psutil

    try:
        process = psutil.Process(pid)
        alive = process.status() != psutil.STATUS_ZOMBIE
        return process if alive and abs(process.create_time() - created) < 2 else None
    except psutil.Error:
        return None


def _end_child(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(STOP_TIMEOUT_S - 5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _state_of(server_pid: int, port: int, deaths: int) -> ServerState:
    import psutil

    supervisor = psutil.Process()
    began = datetime.fromtimestamp(supervisor.create_time()).astimezone()
    return ServerState(
        pid=supervisor.pid,
        created=supervisor.create_time(),
        server_pid=server_pid,
        server_created=psutil.Process(server_pid).create_time(),
        port=port,
        url=f"http://{LOOPBACK}:{port}",
        started=began.isoformat(sep=" ", timespec="seconds"),
        deaths=deaths,
    )


def _state_file() -> Path:
    return _folder() / "state.json"


def _log_file() -> Path:
    return _folder() / "server.log"


def _write_state(state: ServerState) -> None:
    draft = _state_file().with_suffix(".draft")
    draft.write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    draft.replace(_state_file())


def _read_state() -> ServerState | None:
    try:
        fields: dict[str, Any] = json.loads(
            (runs_dir() / "server" / "state.json").read_text(encoding="utf-8")
        )
        return ServerState(**fields)
    except (OSError, ValueError, TypeError):
        return None


def _person_chose_an_api() -> bool:
    if os.environ.get("PREFECT_API_URL"):
        return True
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    try:
        profiles = tomllib.loads((home / "profiles.toml").read_text(encoding="utf-8"))
        name = os.environ.get("PREFECT_PROFILE", profiles.get("active"))
        return "PREFECT_API_URL" in profiles["profiles"][name]
    except (OSError, ValueError, KeyError, TypeError):
        return False


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[2])))
