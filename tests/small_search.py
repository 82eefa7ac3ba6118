"""A search of a few short trials on a tiny model, without Prefect. Also a process of searches to be killed.

    python tests/small_search.py   reads orders, a line of JSON each: {"home": …, "search": {…}}

Each order is carried out by a fork, whose id is printed first and, at its end, its exit status. Everything
heavy is imported once, before MLX computes anything (a fresh process each on macOS, where Metal does not
survive a fork).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tasks  # noqa: F401  (BLAS has to be loaded before mlx)
from search.study import Study, Trial, create_study, held, open_study, study_names
from search.trial_runs import TrialRuns
from search.trials import Search
from search.worker import Begin, Order, Worker
from tasks.config import Settings, TrainSettings
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput
from tasks.tracking import mlflow_run, stored_runs
from tasks.train.trial import WarmBase

TRAIN = {"batch_size": 2, "epochs": 3, "dropout": 0.1, "minutes_per_save": 99, "steps_per_save": 4}
SEARCH = {
    "trials": 6,
    "first_rung": 0.3,
    "learning_rate": {"low": 1e-3, "high": 1e-1},
    "rank": [2, 4],
    "num_layers": [1, 2],
    "workers": 2,
}
NAME = "small"


def small_settings(train: Mapping[str, Any] | None = None, **search: Any) -> Settings:
    """Six trials of 21 updates with a rung at the seventh."""
    plain = {"name": NAME, "train": {**TRAIN, **(train or {})}, "search": {**SEARCH, **search}}
    return Settings.model_validate(plain)


class InProcess:
    """Stands in for `Children`: orders are carried out in this process, at once, by the worker's own code."""

    def __init__(self, begin: Begin, limit: int) -> None:
        self._begin, self._limit = begin, limit
        self._base: WarmBase | None = None
        self._at_work: list[_Here] = []

    @property
    def free(self) -> bool:
        return len(self._at_work) < self._limit

    @property
    def busy(self) -> bool:
        return bool(self._at_work)

    def start(self, order: Order) -> _Here:
        here = _Here()
        worker = Worker(here, self._begin)  # type: ignore[arg-type]
        worker._base = self._base
        worker.carry_out(order)
        self._base = worker._base
        worker.close()
        self._at_work.append(here)
        return here

    def rest(self, here: _Here) -> None:
        self._at_work.remove(here)

    lose = rest

    def messages(self, timeout_s: float) -> Iterator[tuple[_Here, Any]]:
        for here in list(self._at_work):
            yield here, here.receive()

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Here:
    """A child's end and the parent's of a connection."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def send(self, message: Any) -> None:
        self.said.append(message)

    def receive(self) -> Any:
        return self.said.pop(0)


def price(settings: TrainSettings) -> int:
    """A gigabyte a layer: half of a space is over a budget of half as many."""
    return settings.num_layers * 10**9


def run_search(
    settings: Settings,
    model: ModelFolder,
    data: StepOutput,
    budget_bytes: int = 10**12,
    expected: Callable[[TrainSettings], int] = price,
) -> Study:
    """Begin the search of this home, or go on with it; the study at its end."""
    names = study_names()
    study = open_study(names[0]) if names else create_study(NAME, settings.search.objectives)
    with held(study.name):
        study = open_study(study.name)
        tags = {"optuna.study": study.name}
        known = {run.name: run.id for run in stored_runs(settings.tracking)} if names else {}
        with mlflow_run(settings, study.name, tags, resumed=known.get(study.name)) as parent:
            runs = TrialRuns(settings, study, parent, {})
            runs.adopt()
            Search(study, settings, model, data, budget_bytes, expected, runs).run()
    return study


def ending(study: Study) -> dict[int, dict[str, Any]]:
    """All that has to be equal however often a search was killed."""
    return {number: _plain(trial) for number, trial in sorted(study.trials.items())}


def _plain(trial: Trial) -> dict[str, Any]:
    standing = trial.standing
    return {
        "params": dict(trial.params),
        "state": trial.state,
        "val_losses": [list(each) for each in standing.val_losses],
        "ended_by": standing.ended_by,
        "reason": standing.reason,
    }


def carry_out(order: dict[str, Any]) -> None:
    """Search in a home of its own, which holds `model/` and `prepared/`."""
    home = Path(order["home"])
    os.environ["TUNESMITH_HOME"], os.environ["TUNESMITH_CACHE"] = str(home), str(home / "cache")
    model = ModelFolder(home / "model", "tiny-llama", "tiny-fingerprint", str(home / "model"))
    data = StepOutput(home / "prepared", "prepared", False, 0.0)
    study = run_search(small_settings(**order["search"]), model, data)
    (home / "ending.json").write_text(json.dumps(ending(study)))


def main() -> None:
    if len(sys.argv) > 1:
        carry_out(json.loads(sys.argv[1]))
        return
    for line in sys.stdin:
        order = json.loads(line)
        if sys.platform == "darwin":
            process = subprocess.Popen([sys.executable, __file__, line])
            print(process.pid, flush=True)
            print(process.wait(), flush=True)
            continue
        child = os.fork()
        if child == 0:
            try:
                carry_out(order)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
