"""What a training notices of a tracking server that is stopped for a minute: nothing, and no point is lost.

    python benchmarks/outage.py --quick     # ten seconds of outage, half a minute in all
    python benchmarks/outage.py             # sixty, kept under benchmarks/results/

A real MLflow server on loopback is killed in mid-training and started again. The training is a loop of
matrix products that reports three figures a step, through the same run and outbox as every training.
Measured are the longest report (what training waits), the longest step, the points that are missing and
those that are there twice.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from record import record

import tasks  # noqa: F401  (BLAS before MLX)
from tasks.config import Settings, TrackingSettings

BEFORE_S, AFTER_S = 5.0, 5.0
STEP_S = 0.02
NAMES = ("train_loss", "grad_norm", "learning_rate")


def main() -> None:
    """Measure once and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ten seconds of outage")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TUNESMITH_HOME"] = folder
        figures = measure(Path(folder), 10.0 if quick else 60.0)
    record("outage", figures, quick, {})


def measure(folder: Path, outage_s: float) -> dict[str, Any]:
    """Train through an outage; the figures."""
    from tasks.tracking import mlflow_run

    server = Server(folder)
    server.start()
    try:
        with mlflow_run(Settings(tracking=TrackingSettings(uri=server.uri)), "outage", {}) as run:
            loop = Loop(run)
            loop.train(BEFORE_S)
            server.kill()
            loop.train(outage_s)
            starting = server.begin()
            loop.train(AFTER_S)
            server.wait(starting)
            loop.train(AFTER_S)
        histories = {name: run.client.get_metric_history(run.id, name) for name in NAMES}
    finally:
        server.kill()
    stored = [(name, point.step) for name, points in histories.items() for point in points]
    return {
        "outage_s": outage_s,
        "points": loop.steps * len(NAMES),
        "lost": loop.steps * len(NAMES) - len(set(stored)),
        "duplicated": len(stored) - len(set(stored)),
        "longest_report_s": round(loop.longest_report_s, 4),
        "longest_step_s": round(loop.longest_step_s, 4),
    }


class Loop:
    """Steps of a training, and the longest of them."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.steps, self.longest_report_s, self.longest_step_s = 0, 0.0, 0.0

    def train(self, seconds: float) -> None:
        """Steps for so long."""
        import mlx.core as mx

        weights = mx.random.normal((256, 256))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            mx.eval(mx.tanh(weights @ weights))
            reporting = time.perf_counter()
            self._run.report(self.steps, dict.fromkeys(NAMES, float(self.steps)))
            done = time.perf_counter()
            self.steps += 1
            self.longest_report_s = max(self.longest_report_s, done - reporting)
            self.longest_step_s = max(self.longest_step_s, done - began)
            time.sleep(STEP_S)


class Server:
    """A real MLflow server on loopback that can be killed and started again with the same runs."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
        self._command += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
        self._command += ["--artifacts-destination", (folder / "artifacts").as_uri()]
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> subprocess.Popen[bytes]:
        """Start it without waiting until it answers."""
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._process = subprocess.Popen(
            self._command,
            env={**os.environ, **quiet},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self._process

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.wait(self.begin())

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until it answers."""
        while not self._answers():
            if process.poll() is not None:
                sys.exit(f"the MLflow server ended with code {process.returncode}")
            time.sleep(0.2)

    def kill(self) -> None:
        """The whole group: killed alone, its uvicorn would go on serving."""
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


if __name__ == "__main__":
    main()
