"""A search that is killed with -9, parent, child or both, goes on and ends as the one that was not.

`make slow` runs the twenty-four random moments; three kills are in every run of the tests.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tasks.home import CHECKOUT
from tasks.models.folder import ModelFolder
from tasks.prepare.splits import TokenRows, save_splits

SEED = 20261121
MOMENTS = 24
VICTIMS = ("parent", "child", "both")
KILLED = -9
PATIENCE_S = 240.0


class Nursery:
    """A process whose forks search, and are killed."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(CHECKOUT), str(Path(__file__).parent)])
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("small_search.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
            env={**os.environ, "PYTHONPATH": path, "MLX_DISABLE_COMPILE": "1"},
        )

    def begin(self, home: Path, search: dict[str, Any]) -> psutil.Process:
        """Begin or resume the search of a home."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"home": str(home), "search": search}) + "\n")
        self._process.stdin.flush()
        return psutil.Process(int(self._line()))

    def status(self) -> int:
        """Of the search begun last, at its end."""
        return int(self._line())

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelFolder, migrated: Path) -> Path:
    """A home with a model, prepared rows and an empty MLflow store."""
    home = tmp_path_factory.mktemp("pattern")
    shutil.copytree(tiny_model.path, home / "model")
    shutil.copyfile(migrated, home / "mlflow.db")
    (home / "prepared").mkdir()
    draw = np.random.default_rng(3)
    lengths = draw.integers(5, 40, 13)
    rows = [(draw.integers(3, 300, n).tolist(), [place >= n // 2 for place in range(n)]) for n in lengths]
    save_splits(home / "prepared", dict.fromkeys(("train", "valid", "test"), TokenRows.from_rows(rows)))
    return home


@pytest.fixture(scope="module")
def undisturbed(
    nursery: Nursery, pattern: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], float]:
    """The end of a search that nobody killed, and how long it took."""
    home = a_home(pattern, tmp_path_factory.mktemp("undisturbed"))
    started = time.monotonic()
    nursery.begin(home, {})
    assert nursery.status() == 0
    seconds = time.monotonic() - started
    check_nothing_left(home)
    return end_of(home), seconds


def a_home(pattern: Path, folder: Path) -> Path:
    return Path(shutil.copytree(pattern, folder / "home"))


def end_of(home: Path) -> dict[str, Any]:
    """States, values and losses of all trials, and the bytes of every adapter."""
    adapters = sorted(path.read_bytes() for path in home.glob("steps/train/*/adapters.safetensors"))
    return {"trials": json.loads((home / "ending.json").read_text()), "adapters": adapters}


def kill(parent: psutil.Process, victim: str, draw: random.Random) -> None:
    """Kill the parent, one of its children, or all of them; nobody who is gone already."""
    try:
        children = parent.children()
    except psutil.NoSuchProcess:
        return
    chosen = {
        "parent": [parent],
        "child": draw.sample(children, min(1, len(children))),
        "both": [parent, *children],
    }[victim]
    for process in chosen:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def killed_and_resumed(
    nursery: Nursery, home: Path, moment_s: float, victim: str, draw: random.Random
) -> int:
    """Kill at the moment, and go on until the end; how many processes it took."""
    parent = nursery.begin(home, {})
    timer = threading.Timer(moment_s, kill, (parent, victim, draw))
    timer.start()
    starts, deadline = 1, time.monotonic() + PATIENCE_S
    while (status := nursery.status()) != 0:
        assert status == KILLED, f"the search ended with {status}"
        assert time.monotonic() < deadline
        nursery.begin(home, {})
        starts += 1
    timer.cancel()
    return starts


def check_nothing_left(home: Path) -> None:
    """Nothing RUNNING in Optuna and MLflow, no checkpoint, no point twice."""
    with sqlite3.connect(home / "optuna.db") as optuna:
        states = [state for (state,) in optuna.execute("select state from trials")]
    assert sorted(states) == ["COMPLETE"] * 2 + ["PRUNED"] * 4
    with sqlite3.connect(home / "mlflow.db") as mlflow:
        runs = [status for (status,) in mlflow.execute("select status from runs")]
        points = mlflow.execute("select run_uuid, step from metrics where key = 'train_loss'").fetchall()
        tags = mlflow.execute("select value from tags where key = 'optuna.trial'").fetchall()
    assert runs == ["FINISHED"] * 7
    assert sorted(int(value) for (value,) in tags) == list(range(6))
    assert len(set(points)) == len(points) == 2 * 21 + 4 * 7
    assert not list(home.glob("checkpoints/*/step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_in_its_midst_it_ends_as_the_undisturbed_search(
    victim: str, nursery: Nursery, pattern: Path, undisturbed: tuple[dict[str, Any], float], tmp_path: Path
) -> None:
    end, seconds = undisturbed
    home = a_home(pattern, tmp_path)
    starts = killed_and_resumed(nursery, home, 0.7 * seconds, victim, random.Random(SEED))
    assert starts == (1 if victim == "child" else 2)
    assert end_of(home) == end
    check_nothing_left(home)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_the_undisturbed_search(
    nursery: Nursery, pattern: Path, undisturbed: tuple[dict[str, Any], float], tmp_path: Path
) -> None:
    end, seconds = undisturbed
    draw = random.Random(SEED)
    different = []
    for number in range(MOMENTS):
        victim, moment_s = VICTIMS[number % len(VICTIMS)], draw.uniform(0, seconds)
        home = a_home(pattern, tmp_path / str(number))
        killed_and_resumed(nursery, home, moment_s, victim, draw)
        check_nothing_left(home)
        if end_of(home) != end:
            different.append((number, victim, round(moment_s, 2)))
        shutil.rmtree(home)
    assert not different, f"{len(different)} of {MOMENTS} ended otherwise: {different}"
