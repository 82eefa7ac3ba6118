"""Killed with -9 at a hundred points and more, resumed, perhaps killed again: the end is always the same.

Run it as `make kill`. Which points, and how the killed training is made, is in killed_training.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from killed_training import STEPS

from tasks.home import CHECKOUT

POINTS = 120
SEED = 20261121
KILLED = -9

pytestmark = pytest.mark.slow


class Nursery:
    """A process whose children train and are killed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killed_training.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(Path(__file__).parent)])},
        )

    def train(
        self, folder: Path, steps_per_save: int, kill_at: int | None = None, sabotage: Sequence[str] = ()
    ) -> int:
        """Train in `folder`, to the end or until the kill; the exit status."""
        order = {"folder": str(folder), "steps_per_save": steps_per_save, "kill_at": kill_at}
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({**order, "sabotage": list(sabotage)}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    pair = [Nursery(), Nursery()]
    yield pair
    for nursery in pair:
        nursery.close()


@pytest.fixture(scope="module")
def uninterrupted(
    nurseries: list[Nursery], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[int, list[str]]]:
    """The end of a run that was never killed, and the points it passes by how often it saves."""
    ends, points = [], {}
    for steps_per_save in (1, 2):
        folder = tmp_path_factory.mktemp("uninterrupted")
        assert nurseries[0].train(folder, steps_per_save) == 0
        ends.append(end_of(folder))
        points[steps_per_save] = json.loads((folder / "points.json").read_text())
    assert ends[0] == ends[1]
    return ends[0], points


def end_of(folder: Path) -> dict[str, Any]:
    """What has to be equal: all losses, the best adapter, the weights and the optimizer of the last step."""
    last = folder / "checkpoints" / f"step-{STEPS:08d}"
    files = [folder / "result" / "adapters.safetensors", *sorted(last.glob("*.safetensors"))]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert {"adapters.safetensors", "optimizer.safetensors"} <= {path.name for path in last.iterdir()}
    return {"history": json.loads((folder / "result" / "history.json").read_text()), **digests}


def killed_and_resumed(
    nursery: Nursery, folder: Path, steps_per_save: int, kills: list[int], sabotage: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Kill at each of the points in turn, then let it end; the end, None when it does not get there."""
    folder.mkdir()
    for kill_at in [*kills, None]:
        status = nursery.train(folder, steps_per_save, kill_at, sabotage)
        if kill_at == kills[0]:
            assert status == KILLED
        if status == 0:  # a resumed run may end before its second point
            break
    end = end_of(folder) if status == 0 else None
    shutil.rmtree(folder)
    return end


def choose(points: list[str], count: int, seed: int) -> list[int]:
    """Numbers of points, from 1, spread evenly over their kinds."""
    random_source = random.Random(seed)
    by_kind = defaultdict(list)
    for number, kind in enumerate(points, start=1):
        by_kind[kind].append(number)
    for numbers in by_kind.values():
        random_source.shuffle(numbers)
    chosen: list[int] = []
    while len(chosen) < count:
        chosen += [numbers.pop() for numbers in by_kind.values() if numbers]
    return chosen[:count]


def test_the_points_cover_steps_writes_syncs_renames_and_removals(
    uninterrupted: tuple[dict[str, Any], dict[int, list[str]]],
) -> None:
    for points in uninterrupted[1].values():
        kinds = set(points)
        for name in ("fsync", "rename", "save_safetensors", "write_text", "launch", "gradient", "update"):
            assert {f"before {name}", f"after {name}"} <= kinds
        assert {"in save_safetensors", "in write_text", "in rmtree", "after mean_loss"} <= kinds
        assert {points[number - 1] for number in choose(points, POINTS // 2, SEED)} == kinds


def test_every_killed_run_ends_as_the_uninterrupted_one(
    nurseries: list[Nursery], uninterrupted: tuple[dict[str, Any], dict[int, list[str]]], tmp_path: Path
) -> None:
    expected, points = uninterrupted

    def half(steps_per_save: int) -> dict[str, bool]:
        """Half of the points, in one of the nurseries."""
        again = random.Random(SEED + steps_per_save)
        equal = {}
        for number in choose(points[steps_per_save], POINTS // 2, SEED):
            kills = [number] + [again.randint(1, 300)] * again.randint(0, 1)
            folder = tmp_path / f"{steps_per_save}-{number}"
            end = killed_and_resumed(nurseries[steps_per_save - 1], folder, steps_per_save, kills)
            equal[f"{steps_per_save} a save, {kills}, {points[steps_per_save][number - 1]}"] = end == expected
        return equal

    with ThreadPoolExecutor(2) as both:
        equal = {name: same for each in both.map(half, (1, 2)) for name, same in each.items()}
    different = [name for name, same in equal.items() if not same]
    assert len(equal) == POINTS >= 100
    assert not different, f"{len(different)} of {len(equal)} ended otherwise: {different}"


@pytest.mark.parametrize(
    ("sabotage", "noticed"),
    [
        # Rename and checksums each hold alone; the harness has to notice when both are gone.
        (["in place"], False),
        (["unchecked"], False),
        (["in place", "unchecked"], True),
        (["no optimizer"], True),
        (["no place"], True),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, list) else "",
)
def test_the_harness_notices_a_guard_that_is_missing(
    sabotage: list[str],
    noticed: bool,
    nurseries: list[Nursery],
    uninterrupted: tuple[dict[str, Any], dict[int, list[str]]],
    tmp_path: Path,
) -> None:
    # The points are those of this sabotaged program: without renames it passes others.
    assert nurseries[0].train(tmp_path / "whole", 1, None, sabotage) == 0
    points = json.loads((tmp_path / "whole" / "points.json").read_text())
    middle = [number for number, kind in enumerate(points, 1) if kind == "in save_safetensors"]
    ends = [
        killed_and_resumed(nurseries[0], tmp_path / str(number), 1, [number], sabotage)
        for number in random.Random(SEED).sample(middle[4:], 6)
    ]
    assert any(end != uninterrupted[0] for end in ends) is noticed
