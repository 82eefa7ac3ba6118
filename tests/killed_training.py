"""A tiny training that kills itself at a chosen point. Started by test_train_kill.py; no test itself.

    python tests/killed_training.py   reads orders, a line of JSON each, and answers each with an exit status

Everything heavy is imported once, before MLX computes anything; each order is then carried out by
a fork of this process (a fresh process on macOS, where Metal does not survive a fork). The points are
not in the product's code: the functions that touch the disk or the weights are wrapped here, and
every call of one of them is a point before it, in the middle of what it writes, and after it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from conftest import TINY_LLAMA
from mlx_lm.models.llama import Model, ModelArgs

from tasks.config import TrainSettings
from tasks.prepare.splits import TokenRows
from tasks.publish import publishing, write_json
from tasks.train import checkpoints, loop
from tasks.train.adapters import adapter_config, add_adapter, save_adapter
from tasks.train.checkpoints import (
    BEST_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    Checkpoints,
    owned,
)
from tasks.train.loop import fit
from tasks.train.state import Training
from tasks.train.update import Updates

STEPS = 12
SETTINGS = {
    "num_layers": 2,
    "rank": 4,
    "dropout": 0.1,
    "learning_rate": 1e-2,
    "batch_size": 2,
    "accumulation_steps": 2,  # seven batches, four updates an epoch, the last one of one batch
    "epochs": 99,
    "max_steps": STEPS,
    "steps_per_eval": 5,
}
CLOCKED = ("tokens_per_second", "iterations_per_second", "peak_memory")


class Points:
    """Counts the points that are passed and kills this process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at
        self.passed: list[str] = []

    def pass_by(self, name: str, spoil: Callable[[], object] | None = None) -> None:
        """A point; `spoil` leaves things as they are in the middle of the work."""
        self.passed.append(name)
        if len(self.passed) == self.kill_at:
            if spoil:
                spoil()
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, holder: Any, name: str, path_at: int | None = None) -> None:
        """Wrap `holder.name`; with `path_at`, the place of the path it writes, in the middle of that too."""
        plain = getattr(holder, name)

        def wrapped(*given: Any, **named: Any) -> Any:
            self.pass_by(f"before {name}")
            result = plain(*given, **named)
            if path_at is not None:
                self.pass_by(f"in {name}", lambda: halve(Path(given[path_at])))
            self.pass_by(f"after {name}")
            return result

        setattr(holder, name, wrapped)

    def watch_removal(self) -> None:
        """Wrap rmtree, with a point where one file is gone and the others are not."""
        plain = shutil.rmtree

        def wrapped(path: Path, *given: Any, **named: Any) -> None:
            files = sorted(Path(path).glob("*"))
            self.pass_by("before rmtree")
            self.pass_by("in rmtree", files[0].unlink if files else None)
            plain(path, *given, **named)
            self.pass_by("after rmtree")

        shutil.rmtree = wrapped  # type: ignore[assignment]


def halve(path: Path) -> None:
    """What is on the disk in the middle of writing a file."""
    os.truncate(path, path.stat().st_size // 2)


def watch(kill_at: int | None) -> Points:
    """Points around all that a kill could come between."""
    points = Points(kill_at)
    points.around(mx, "save_safetensors", path_at=0)
    points.around(Path, "write_text", path_at=0)
    points.around(Path, "mkdir")
    points.around(os, "fsync")
    points.around(os, "rename")
    points.around(os, "replace")
    points.watch_removal()
    points.around(loop, "mean_loss")
    points.around(Updates, "launch")
    points.around(Updates, "gradient")
    points.around(optim.AdamW, "update")
    return points


@contextmanager
def writing_in_place(target: Path) -> Iterator[Path]:
    """What `publishing` would be without its draft and its rename."""
    target.mkdir(parents=True, exist_ok=True)
    yield target


def read_unchecked(path: Path) -> Checkpoint:
    """What reading a checkpoint would be without its checksums."""
    training = Training.from_plain(json.loads((path / STATE_FILE).read_text()))
    weights, optimizer = (_sorted(path / name) for name in (WEIGHTS_FILE, OPTIMIZER_FILE))
    if training.best_step:
        best = path / BEST_FILE
        training.best_weights = _sorted(best) if best.exists() else weights
    return Checkpoint(path, training, weights, optimizer)


def _sorted(path: Path) -> dict[str, mx.array]:
    arrays: Any = mx.load(str(path))
    return dict(sorted(arrays.items()))


SABOTAGE: dict[str, Callable[[], None]] = {
    "in place": lambda: setattr(checkpoints, "publishing", writing_in_place),
    "unchecked": lambda: setattr(checkpoints, "_read", read_unchecked),
    "no optimizer": lambda: setattr(loop, "restore_optimizer", lambda *_: None),
    "no place": lambda: setattr(Training, "position", property(lambda _: 0, lambda *_: None)),
}
"""Guards taken away, by name."""


def train(folder: Path, steps_per_save: int, kill_at: int | None, sabotage: list[str]) -> None:
    """Train in `folder` to the end or to the kill; publish `result/` and name the points passed."""
    for name in sabotage:
        SABOTAGE[name]()
    points = watch(kill_at)
    settings = TrainSettings.model_validate({**SETTINGS, "steps_per_save": steps_per_save})
    mx.random.seed(11)
    network = Model(ModelArgs.from_dict(TINY_LLAMA))
    config = adapter_config(settings, 4)
    add_adapter(network, config, settings.seed)
    with owned(folder / "checkpoints", "the test"):
        kept = Checkpoints(folder / "checkpoints", settings)
        result = fit(network, rows(), rows(), settings, lambda *_: None, kept)
        history = [
            (step, {name: value for name, value in metrics.items() if name not in CLOCKED})
            for step, metrics in result.history
        ]
        with publishing(folder / "result") as draft:
            save_adapter(draft, result.best_weights, config)
            write_json(draft / "history.json", history)
    (folder / "points.json").write_text(json.dumps(points.passed))


def rows() -> TokenRows:
    """Thirteen random rows of 5 to 20 tokens, the second half of each supervised."""
    random = np.random.default_rng(3)
    lengths = random.integers(5, 20, 13)
    return TokenRows.from_rows(
        [(random.integers(3, 300, n).tolist(), [place >= n // 2 for place in range(n)]) for n in lengths]
    )


def carry_out(order: dict[str, Any]) -> int:
    """Train as ordered in another process; its exit code, or minus the signal that ended it."""
    if sys.platform == "darwin":
        return subprocess.run(
            [sys.executable, __file__, json.dumps(order)], stderr=subprocess.DEVNULL
        ).returncode
    child = os.fork()
    if child == 0:
        try:
            train(Path(order.pop("folder")), **order)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    if len(sys.argv) > 1:
        order = json.loads(sys.argv[1])
        train(Path(order.pop("folder")), **order)
        return
    for line in sys.stdin:
        print(carry_out(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
