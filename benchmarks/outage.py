"""What a training notices of a tracking server that is stopped for a minute: nothing, and no point is lost.

    python benchmarks/outage.py --quick     # ten seconds of outage, half a minute in all
    python benchmarks/outage.py             # sixty, kept under benchmarks/results/

A real MLflow server on loopback is killed in mid-training and started again. The training is the product's
own loop on a tiny model, some fifteen updates a second. Measured are, from the kill on, the longest report
(what training waits), the longest time from one report to the next, the points that are missing in the end
and those that are there twice.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import bare_engine  # noqa: F401
from record import record
from step_models import as_ours, make_base
from step_rows import made_rows

from tasks.config import Settings, TrackingSettings, TrainSettings
from tasks.tracking import Run, mlflow_run
from tasks.train.adapters import adapter_config, add_adapter
from tasks.train.loop import fit
from tasks.train.targets import target_keys

BEFORE_S, AFTER_S = 5.0, 5.0
LENGTH, WARM_STEPS = 128, 50


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
    server = Server(folder)
    server.start()
    try:
        with mlflow_run(Settings(tracking=TrackingSettings(uri=server.uri)), "outage", {}) as run:
            watched = Watched(run)
            outage = threading.Thread(target=_go_down, args=(server, watched, outage_s), daemon=True)
            outage.start()
            with suppress(Ended):
                train(watched)
            outage.join()
        names = {name for name, _ in watched.points}
        histories = {name: run.client.get_metric_history(run.id, name) for name in names}
    finally:
        server.kill()
    stored = [(name, point.step) for name, points in histories.items() for point in points]
    return {
        "outage_s": outage_s,
        "updates": watched.step,
        "points": len(watched.points),
        "lost": len(watched.points - set(stored)),
        "duplicated": len(stored) - len(set(stored)),
        "longest_report_s": round(watched.longest_report_s, 4),
        "longest_step_s": round(watched.longest_step_s, 4),
    }


def train(report: Watched) -> None:
    """The training loop on a tiny model, until its reports end it."""
    network = as_ours(make_base("tiny", "lora")).copy()
    settings = TrainSettings(num_layers=2, epochs=10**6, steps_per_eval=10**6, frozen_prefix="never")
    keys = target_keys(network, settings.targets, settings.num_layers)
    add_adapter(network, adapter_config(settings, len(network.layers), keys), settings.seed)
    rows = made_rows("tiny", 16, LENGTH, 50)
    fit(network, rows, rows, settings, report)


def _go_down(server: Server, watched: Watched, outage_s: float) -> None:
    while watched.step < WARM_STEPS:
        time.sleep(0.05)
    time.sleep(BEFORE_S)
    watched.attentive = True
    server.kill()
    time.sleep(outage_s)
    server.start()
    time.sleep(AFTER_S)
    watched.ended = True


class Ended(Exception):  # noqa: N818  (no error: enough was measured)
    """Out of the training loop."""


class Watched:
    """Reports of a training to its run, and how long each and the work between them takes.

    Attributes:
        attentive: from when on that is noted; before it, functions are compiled.
        points: the names and steps that were reported.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._last = run, time.perf_counter()
        self.step, self.attentive, self.ended = 0, False, False
        self.points: set[tuple[str, int]] = set()
        self.longest_report_s = self.longest_step_s = 0.0

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """As `tasks.train.loop.Report`."""
        if self.ended:
            raise Ended
        began = time.perf_counter()
        self._run.report(step, metrics)
        done = time.perf_counter()
        if self.attentive:
            self.longest_report_s = max(self.longest_report_s, done - began)
            self.longest_step_s = max(self.longest_step_s, done - self._last)
        self.step, self._last = step, done
        self.points |= {(name, step) for name in metrics}


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
