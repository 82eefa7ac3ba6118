"""Wall clock of `tunesmith finetune` beside that of the `mlx_lm.lora` command, for the same work.

    python benchmarks/whole_run.py --quick            # 100 rows: start-up weighs most, 4 minutes
    python benchmarks/whole_run.py --share 0.1        # the first tenth of the three epochs
    python benchmarks/whole_run.py --rows 500         # three epochs of so many rows; 20 minutes on two cores
    python benchmarks/whole_run.py                    # three epochs of all; an hour

Both start from the same model folder, in processes of their own, and do: LoRA of the same rank, scale and
learning rate on the last 8 layers, the same number of updates of 4 rows with prompts masked, the whole
validation set before, after every epoch and at the end, and the test loss of the tuned model. mlx_lm reads
the folder that Tunesmith prepared. MLX has the same BLAS on either side: plain `mlx_lm.lora` on Linux would
be thirty times slower on CPU.

What Tunesmith alone does is left in: reading, checking and tokenising the data, computing the frozen layers,
Prefect's start and MLflow's in an empty home, clipping the gradient, the test loss of the base, the report
page, checkpoints. Sample answers, fusing and registering are switched off: mlx_lm has nothing beside them.

`whole_run_ratio` is mlx_lm's time over Tunesmith's. `overhead_share` is, in a run of 500 updates (`--quick`:
of the same few), the time that is neither a step's own work nor start-up, over that of training: what
tracking takes within the steps, and Prefect between and after them. `startup_s` is apart: from the start of
the process to the first step, with the imports, Prefect's server and MLflow's database made anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import yaml

import tasks  # noqa: F401  (sets the process up before MLX is imported)

CHECKOUT = Path(__file__).parent.parent
EPOCHS, BATCH_SIZE, LAYERS, RANK, SCALE, RATE = 3, 4, 8, 8, 4.0, 2e-4
OVERHEAD_STEPS = 500
QUICK_ROWS = 100
STEPS = ("models", "prepare", "train", "evaluate", "report")


def main() -> None:
    """Run, measure, record."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="100 rows of the data")
    parser.add_argument("--rows", type=int, help="of the data; all by default")
    parser.add_argument("--share", type=float, default=1.0, help="of the three epochs")
    parser.add_argument("--minutes", type=float, help="give up on a command that takes longer")
    parser.add_argument("--model", help="a model folder, in place of the bundled model")
    parser.add_argument("--child", type=Path, metavar="CONFIG", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rows = QUICK_ROWS
    if chosen.child:
        print(json.dumps(overhead(chosen.child, started)))
        return
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        measured = _measure(Path(folder), chosen)
    ours_s, theirs_s, apart = measured["tunesmith_s"], measured["mlx_lm_s"], measured["overhead"]
    figures = {
        "whole_run_ratio": round(theirs_s / ours_s, 3),
        "tunesmith_s": round(ours_s, 1),
        "mlx_lm_s": round(theirs_s, 1),
        "overhead_share": round(overhead_share(apart), 4),
        "startup_s": round(apart["startup_s"], 1),
    }
    from record import record

    record("whole_run", figures, chosen.quick or chosen.share < 1, measured)


def overhead_share(apart: Mapping[str, float]) -> float:
    """What tracking and orchestration take over the time of training itself."""
    return (apart["tracking_s"] + apart["between_s"]) / apart["training_s"]


def overhead(config: Path, started: float) -> dict[str, float]:
    """Run the finetune flow in this process and tell steps, tracking and the rest apart, in seconds.

    A step's work is what the plain functions that its task calls take, without the calls of the MLflow run
    within them.
    """
    from flows.prefect_environment import prepare_prefect, wake_server
    from tasks.config import load_settings

    prepare_prefect(quiet=True)
    from flows.finetune import finetune

    wake_server()
    watch = _Watch()
    for step in STEPS:
        watch.time_functions(sys.modules[f"tasks.{step}"])
    watch.time_tracking()
    finetune(load_settings(config))
    ended = time.perf_counter()
    return {
        "startup_s": watch.first - started,
        "training_s": watch.seconds["train"],
        "work_s": sum(watch.seconds.values()),
        "tracking_s": watch.tracking_s,
        "between_s": ended - watch.first - sum(watch.seconds.values()) - watch.tracking_s,
    }


class _Watch:
    """Seconds in the steps' functions, and in the tracking within them; what is nested counts once."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STEPS, 0.0)
        self.tracking_s, self.first = 0.0, math.inf
        self.step, self.tracking = "", False

    def time_functions(self, package: Any) -> None:
        """Time the plain functions that the step's task calls: those that its package imports from itself."""
        step = package.__name__.removeprefix("tasks.")
        for name, value in vars(package).items():
            if isinstance(value, FunctionType) and value.__module__.startswith(package.__name__ + "."):
                setattr(package, name, self._timed_step(step, value))

    def time_tracking(self) -> None:
        """Time what a step asks of its MLflow run."""
        from tasks.tracking import Run

        for name, value in list(vars(Run).items()):
            if isinstance(value, FunctionType) and not name.startswith("_"):
                setattr(Run, name, self._timed_tracking(value))

    def _timed_step(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.step:
                return function(*args, **kwargs)
            started, tracked = time.perf_counter(), self.tracking_s
            self.first, self.step = min(self.first, started), step
            try:
                return function(*args, **kwargs)
            finally:
                self.step = ""
                self.seconds[step] += time.perf_counter() - started - (self.tracking_s - tracked)

        return timed

    def _timed_tracking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.tracking or not self.step:
                return function(*args, **kwargs)
            started, self.tracking = time.perf_counter(), True
            try:
                return function(*args, **kwargs)
            finally:
                self.tracking = False
                self.tracking_s += time.perf_counter() - started

        return timed


def _measure(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Both commands one after the other, and the overhead."""
    model, data, rows = _prepared(folder / "given", chosen)
    epoch = math.ceil(rows / BATCH_SIZE)
    steps = max(1, round(EPOCHS * epoch * chosen.share))
    config = folder / "finetune.yaml"
    settings = _our_settings(model, chosen.rows, steps, epoch)
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    theirs = folder / "lora.yaml"
    theirs.write_text(yaml.safe_dump(_their_settings(model, data, folder, steps, epoch)), encoding="utf-8")
    limit_s = chosen.minutes and 60 * chosen.minutes
    python = [sys.executable, "-m"]
    ours_s = _run([*python, "flows.cli", "finetune", str(config)], _homes(folder / "ours"), limit_s)[0]
    print(f"tunesmith finetune: {ours_s:.1f} s for {steps} updates of {rows} rows", flush=True)
    theirs_s = _run([*python, "mlx_lm", "lora", "--train", "--test", "-c", str(theirs)], _blas(), limit_s)[0]
    print(f"mlx_lm.lora: {theirs_s:.1f} s", flush=True)
    settings["train"]["max_steps"] = steps if chosen.quick else OVERHEAD_STEPS
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    child = [sys.executable, __file__, "--child", str(config)]
    apart: dict[str, float] = json.loads(_run(child, _homes(folder / "apart"), limit_s)[1].splitlines()[-1])
    return {"steps": steps, "rows": rows, "tunesmith_s": ours_s, "mlx_lm_s": theirs_s, "overhead": apart}


def _prepared(home: Path, chosen: argparse.Namespace) -> tuple[Path, Path, int]:
    """The model's folder, and a folder of prepared data for mlx_lm with the number of training rows."""
    from tasks.config import DataSettings, ModelSettings
    from tasks.models.resolve import resolve_model
    from tasks.prepare.pipeline import prepare_data
    from tasks.prepare.splits import load_splits

    model = resolve_model(ModelSettings(source=chosen.model) if chosen.model else ModelSettings())
    before = os.environ.get("TUNESMITH_HOME")
    os.environ["TUNESMITH_HOME"] = str(home)
    try:
        data = prepare_data(DataSettings(**_data(chosen.rows)), model)
    finally:
        os.environ.pop("TUNESMITH_HOME")
        if before is not None:
            os.environ["TUNESMITH_HOME"] = before
    return model.path, data.path, len(load_splits(data.path)["train"])


def _data(rows: int | None) -> dict[str, Any]:
    return {"source": "stdlib", "max_rows": rows}


def _our_settings(model: Path, rows: int | None, steps: int, epoch: int) -> dict[str, Any]:
    return {
        "name": "whole-run",
        "model": {"source": str(model)},
        "data": _data(rows),
        "train": {
            "num_layers": _layers(model),
            "rank": RANK,
            "scale": SCALE,
            "learning_rate": RATE,
            "schedule": "constant",
            "warmup_steps": 0,
            "batch_size": BATCH_SIZE,
            "epochs": EPOCHS,
            "max_steps": steps,
            "steps_per_eval": epoch,
        },
        "evaluate": {"samples": 0, "batch_size": BATCH_SIZE},
        "fuse": {"enabled": False},
        "register": {"enabled": False},
    }


def _their_settings(model: Path, data: Path, folder: Path, steps: int, epoch: int) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": str(data),
        "adapter_path": str(folder / "adapters"),
        "num_layers": _layers(model),
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0},
        "optimizer": "adamw",
        "learning_rate": RATE,
        "batch_size": BATCH_SIZE,
        "iters": steps,
        "mask_prompt": True,
        "steps_per_eval": epoch,
        "val_batches": -1,
        "test_batches": -1,
    }


def _layers(model: Path) -> int:
    """8 as in the figures, or all of a smaller model's."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return min(LAYERS, int(config["num_hidden_layers"]))


def _homes(folder: Path) -> dict[str, str]:
    """Nothing made before: no database, no cache, no server."""
    folder.mkdir()  # Prefect makes its home, but not what that is in
    names = {"TUNESMITH_HOME": "runs", "TUNESMITH_CACHE": "cache", "PREFECT_HOME": "prefect"}
    return {name: str(folder / place) for name, place in names.items()}


def _blas() -> dict[str, str]:
    """The BLAS that Tunesmith loads ahead of MLX's own, for a process that does not."""
    from tasks.process import load_blas

    found = load_blas()
    return {"LD_PRELOAD": found} if found else {}


def _run(command: list[str], environment: Mapping[str, str], limit_s: float | None) -> tuple[float, str]:
    """Seconds that a command takes as a whole process, which has to succeed, and what it prints."""
    started = time.perf_counter()
    whole = {**os.environ, "PYTHONPATH": str(CHECKOUT), **environment}
    try:
        done = subprocess.run(
            command, env=whole, cwd=CHECKOUT, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        sys.exit(f"{' '.join(command[2:4])} took longer than --minutes; give a smaller --share")
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return seconds, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)


if __name__ == "__main__":
    main()
