"""The whole road as a person meets it: the first quickstart, and the second with and without a server.

    python benchmarks/quickstart.py --quick     # one second run of each kind, about 6 minutes
    python benchmarks/quickstart.py             # three of each, kept under benchmarks/results/

`plain_second_run_s` is the second run without Prefect: its steps called as functions in one MLflow run, in a
process that does not import Prefect. What a flow run costs beyond it is `startup_overhead_s`, with
a server `startup_overhead_with_server_s`.

Every run has an empty home, an empty cache and an empty Prefect home of its own. The figures of the
first run are read from MLflow, not from what the command prints.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tasks  # noqa: F401  (sets the process up before MLflow is imported)

CHECKOUT = Path(__file__).parent.parent
sys.path.insert(0, str(CHECKOUT))

PLAIN = (str(Path(__file__).with_name("plain_quickstart.py")),)


def main() -> None:
    """Run, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one second run of each kind")
    quick = parser.parse_args().quick
    repeats = 1 if quick else 3
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        help_s = statistics.median(run(home, "--help") for _ in range(5))
        first_s = run(home, "quickstart")
        alone = [run(home, "quickstart") for _ in range(repeats)]
        plain = [run(home, program=PLAIN) for _ in range(repeats)]
        run(home, "up", "--port", "4291")
        try:
            served = [run(home, "quickstart") for _ in range(repeats)]
        finally:
            run(home, "down")
        figures = {
            "help_s": round(help_s, 2),
            "first_run_s": round(first_s, 1),
            "second_run_s": round(statistics.median(alone), 1),
            "second_run_with_server_s": round(statistics.median(served), 1),
            "plain_second_run_s": round(statistics.median(plain), 1),
            "startup_overhead_s": round(statistics.median(alone) - statistics.median(plain), 1),
            "startup_overhead_with_server_s": round(statistics.median(served) - statistics.median(plain), 1),
            **figures_in_mlflow(home),
        }
    from record import record

    details = {"second_runs_s": alone, "second_runs_with_server_s": served, "plain_second_runs_s": plain}
    record("quickstart", figures, quick, details)


def run(home: Path, *arguments: str, program: Sequence[str] = ("-m", "flows.cli")) -> float:
    """Seconds that one `tunesmith` command takes as a whole process; it has to succeed."""
    environment = {
        **os.environ,
        "TUNESMITH_HOME": str(home / "runs"),
        "TUNESMITH_CACHE": str(home / "cache"),
        "PREFECT_HOME": str(home / "prefect"),
    }
    started = time.perf_counter()
    with (home / "output.txt").open("w+") as output:
        command = [sys.executable, *program, *arguments]
        done = subprocess.run(command, env=environment, cwd=CHECKOUT, stdout=output, stderr=output)
        seconds = time.perf_counter() - started
        output.seek(0)
        told = " ".join(command[1:])
        if done.returncode != 0:
            sys.exit(f"{told} exited with {done.returncode}:\n{output.read()}")
    print(f"{told}: {seconds:.1f} s", flush=True)
    return seconds


def figures_in_mlflow(home: Path) -> dict[str, float]:
    """What the first run left in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("tunesmith")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    first = runs[0]
    losses = client.get_metric_history(first.info.run_id, "val_loss")
    before = next(point.value for point in losses if point.step == 0)
    adapter = {item.path for item in client.list_artifacts(first.info.run_id, "adapter")}
    if "adapter/adapters.safetensors" not in adapter:
        sys.exit("the first run left no adapter in MLflow")
    return {
        "val_loss_before": round(before, 4),
        "val_loss_after": round(first.data.metrics["best_val_loss"], 4),
        "val_loss_reduction": round(1 - first.data.metrics["best_val_loss"] / before, 4),
        "mlflow_metrics": len(first.data.metrics),
        "train_loss_points": len(client.get_metric_history(first.info.run_id, "train_loss")),
        "peak_memory_gb": round(first.data.metrics["peak_memory"], 3),
    }


if __name__ == "__main__":
    main()
