"""One measurement each: a training step, a validation, a curve, a peak of memory.

Every cell is of one base model, one way of holding it, one depth and one kind of rows, and has a key by
which a run that was cut off finds what it has measured before.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import bare_engine  # noqa: F401
import mlx.core as mx
import numpy as np
from mlx_lm.tuner.callbacks import TrainingCallback
from step_models import Base, as_ours, head_over_body, make_base
from step_rows import Chats, made_rows, positions, their_rows
from step_trainers import (
    OurTrainer,
    TheirTrainer,
    batch_of,
    cache_of_its_own,
    exactly_supervised,
    in_turns,
    shape_of,
    their_batches,
)

from tasks.config import TrainSettings
from tasks.prepare.splits import TokenRows
from tasks.train.batches import update_groups

ALL = -1
SYNTHETIC, STDLIB = "synthetic", "stdlib"
EPOCHS = 3
"""Of the chats: what a run that uses the frozen layers' output again and again passes over."""

DISTINCT_BATCHES = 4
"""Of made rows, which are all of one length: a few serve, and their frozen layers are soon computed."""

LONGEST_CHAT = 2048
"""The default of either side."""

LOSS_BATCHES = 4
MEMORY_STEPS = 3

MLX_ALONE = {"MLX_MAX_MB_PER_BUFFER": "1000"}
"""What MLX (0.32.4) takes by itself on a large CUDA GPU; `tasks.process` sets less."""

CURVE_LENGTH, CURVE_BATCH, CURVE_RATE = 64, 4, 1e-4

Item = TypeVar("Item")


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        kind: "step", "validation", "memory" or "curves".
        layers: adapted, from the top; -1 for all.
        length: positions of a row; 0 for chats, which have their own.
        prompt_percent: of the positions that are not supervised; 0 for chats.
    """

    kind: str
    model: str
    method: str
    layers: int
    batch_size: int
    length: int = 0
    prompt_percent: int = 0
    rows: str = SYNTHETIC

    @property
    def key(self) -> str:
        """Short, readable, and unlike that of any other cell."""
        depth = "all" if self.layers == ALL else str(self.layers)
        shape = STDLIB if self.rows == STDLIB else f"{self.length}x{self.prompt_percent}%"
        return f"{self.kind} {self.model} {self.method} k={depth} b={self.batch_size} {shape}"

    def settings(self, **changes: Any) -> TrainSettings:
        """The product's defaults but for what the cell says; the learning rate is the same in every step."""
        return TrainSettings(
            num_layers=self.layers,
            batch_size=self.batch_size,
            frozen_prefix="always",
            prefix_cache_gb=1000,
            schedule="constant",
            warmup_steps=0,
            **changes,
        )


def adapted_share(cell: Cell, layers: int) -> float:
    """f: the adapted layers over all."""
    return 1.0 if cell.layers == ALL else cell.layers / layers


def arithmetic_ratio(f: float, h: float, c: float) -> float:
    """What the matrix products allow: a plain step over one with both ideas, in forward passes of the body.

    A plain step costs 1 + f + 2h (forward through all layers and the head, backward through the head and the
    adapted layers; frozen weights have no gradient of their own), one with both ideas 2f + 2hc.

    Args:
        f: adapted share of the layers.
        h: the head over the body, see `head_over_body`.
        c: supervised share of the positions.
    """
    return (1 + f + 2 * h) / (2 * f + 2 * h * c)


def measure_step(cell: Cell, bases: tuple[Base, Base], chats: Chats | None, steps: int) -> dict[str, Any]:
    """Both sides' steps in turns, their memory apart, and their losses from equal weights.

    Args:
        bases: ours and mlx-lm's; the same one where both hold it alike.
        steps: timed, of either side.
    """
    block = min(3, steps)
    with cache_of_its_own():
        rows = chats.train if chats else _rows_of(cell)
        ours, theirs = _sides(cell, bases, rows)
        enough = EPOCHS * (len(rows) // cell.batch_size) if chats else steps * 2
        count = max(1, min(round(steps / block), enough // (block + 1)))
        every = count * (block + 1)
        first_groups = list(firsts(islice(ours.groups(), every), shape_of))
        if chats:
            first_batches = list(firsts(islice(_chat_batches(chats, cell), every), _width))
            batches = _chat_batches(chats, cell)
        else:
            batches = _same_batches(rows, cell)
            first_batches = [next(_same_batches(rows, cell))]
        times = in_turns(ours, theirs, batches, (first_groups, first_batches), count, block)
        figures = _speed(cell, times, rows)
        figures["loss_difference"] = _loss_difference(ours, theirs, rows)
        figures["prefix_s"] = ours.prefix_s
    f, h = adapted_share(cell, bases[0].layers), head_over_body(bases[0].config)
    c = int(rows.supervised.sum()) / positions(rows)
    arithmetic = arithmetic_ratio(f, h, c)
    shares = {"f": f, "h": h, "c": c, "arithmetic_ratio": arithmetic}
    return {**figures, **shares, "share_of_arithmetic": figures["ratio"] / arithmetic}


def measure_validation(
    cell: Cell, bases: tuple[Base, Base], chats: Chats | None, rounds: int
) -> dict[str, Any]:
    """`mean_loss` beside mlx-lm's `evaluate` over the same rows, in turns, after one round of each."""
    with cache_of_its_own():
        if chats:
            valid, dataset = chats.valid, chats.their_valid
        else:
            valid = _rows_of(cell)
            dataset = their_rows(valid, np.arange(len(valid)))
        longest = LONGEST_CHAT if chats else cell.length + 1
        if len(valid) % cell.batch_size:
            raise ValueError(f"{len(valid)} rows in batches of {cell.batch_size}: mlx-lm would drop some")
        ours, theirs = _sides(cell, bases, valid, valid)
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(rounds + 1):
            for name, validate in (
                ("ours", ours.validate),
                ("theirs", lambda: theirs.validate(dataset, longest)),
            ):
                started = time.perf_counter()
                validate()
                seconds[name].append(time.perf_counter() - started)
    our_s, their_s = (statistics.median(seconds[name][1:]) for name in ("ours", "theirs"))
    return {
        "rows": len(valid),
        "our_s": our_s,
        "their_s": their_s,
        "ratio": their_s / our_s,
        "rounds": seconds,
    }


def measure_curves(cell: Cell, bases: tuple[Base, Base], steps: int) -> dict[str, Any]:
    """Both sides' losses over so many steps of their own on the same batches, without clipping."""
    with cache_of_its_own():
        rows = made_rows(cell.model, steps * cell.batch_size, cell.length, cell.prompt_percent)
        changes = {"max_grad_norm": None, "learning_rate": CURVE_RATE}
        ours, theirs = _sides(cell, bases, rows, **changes)
        our_losses = [ours.step(group) for group in islice(ours.groups(), steps)]
        heard = _Losses()
        theirs.train(lambda **_: islice(_same_batches(rows, cell), steps), steps, heard)
    differences = [abs(our - their) for our, their in zip(our_losses, heard.losses, strict=True)]
    return {
        "steps": steps,
        "max_curve_difference": max(differences),
        "our_losses": our_losses,
        "their_losses": heard.losses,
    }


def measure_memory(cell: Cell) -> dict[str, float]:
    """Peak memory of either side, in a process of its own that holds nothing of the other."""
    figures = {}
    for side in ("our", "their"):
        command = [sys.executable, str(Path(__file__)), side, json.dumps(asdict(cell))]
        environment = {**os.environ, **(MLX_ALONE if side == "their" else {})}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{side} side of {cell.key}:\n{done.stderr}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        figures |= {f"{side}_{name}": value for name, value in found.items()}
    return {**figures, "memory_ratio": figures["our_peak_gb"] / figures["their_peak_gb"]}


def peaks(side: str, cell: Cell) -> dict[str, float]:
    """Of this process, in GB: from the loaded base on (`peak_gb`), and of the steps alone."""
    rows = _rows_of(cell)
    base = make_base(cell.model, cell.method)
    if side == "our":
        base = as_ours(base)
    network = base.copy()
    del base  # else the frozen layers would stay
    mx.clear_cache()
    mx.reset_peak_memory()
    with cache_of_its_own():
        if side == "our":
            ours = OurTrainer(network, rows, cell.settings())
            del network
            building = mx.get_peak_memory()
            mx.clear_cache()
            mx.reset_peak_memory()
            for group in islice(ours.groups(), MEMORY_STEPS):
                ours.step(group)
        else:
            building = 0
            theirs = TheirTrainer(network, None, cell.settings())
            theirs.train(lambda **_: islice(_same_batches(rows, cell), MEMORY_STEPS), MEMORY_STEPS)
    steps = mx.get_peak_memory()
    return {"peak_gb": max(building, steps) / 1e9, "steps_peak_gb": steps / 1e9}


def firsts(items: Iterable[Item], shape: Callable[[Item], Any]) -> Iterator[Item]:
    """Of each shape the first item."""
    seen = set()
    for item in items:
        if (found := shape(item)) not in seen:
            seen.add(found)
            yield item


class _Losses(TrainingCallback):
    """Hears the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.losses.append(train_info["train_loss"])


def _rows_of(cell: Cell) -> TokenRows:
    count = DISTINCT_BATCHES * cell.batch_size
    return made_rows(cell.model, count, cell.length, cell.prompt_percent)


def _sides(
    cell: Cell, bases: tuple[Base, Base], rows: TokenRows, valid: TokenRows | None = None, **changes: Any
) -> tuple[OurTrainer, TheirTrainer]:
    """Both sides with the same adapter."""
    settings = cell.settings(**changes)
    ours = OurTrainer(bases[0].copy(), rows, settings, valid)
    return ours, TheirTrainer(bases[1].copy(), ours.weights, settings)


def _same_batches(rows: TokenRows, cell: Cell) -> Iterator[tuple[mx.array, mx.array]]:
    """The batches that our side has, in the same order, as mlx-lm pads them."""
    for group in update_groups(rows, cell.batch_size, 1, cell.settings().seed):
        yield batch_of(their_rows(rows, group.batches[0].rows))


def _chat_batches(chats: Chats, cell: Cell) -> Iterator[tuple[mx.array, mx.array]]:
    return their_batches(chats.their_train, cell.batch_size, LONGEST_CHAT, EPOCHS)


def _width(batch: tuple[mx.array, mx.array]) -> int:
    return int(batch[0].shape[1])


def _speed(cell: Cell, times: dict[str, Any], rows: TokenRows) -> dict[str, Any]:
    """Tokens a second of either side and what they are to each other.

    Rows made have one length, so blocks are alike and medians count. Chats have many: the whole counts, as
    tokens of the rows; padding is none.
    """
    our_tokens = [int(sum(rows.lengths[each].sum() for each in block)) for block in times["our_groups"]]
    their_tokens = [
        int(sum(bounds[:, 1].sum().item() for bounds in block)) for block in times["their_batches"]
    ]
    our_rate, their_rate = (
        sum(tokens) / sum(seconds)
        if cell.rows == STDLIB
        else statistics.median(count / second for count, second in zip(tokens, seconds, strict=True))
        for tokens, seconds in ((our_tokens, times["ours"]), (their_tokens, times["theirs"]))
    )
    return {
        "our_tokens_per_second": our_rate,
        "their_tokens_per_second": their_rate,
        "ratio": our_rate / their_rate,
        "our_first_s": times["our_first_s"],
        "their_first_s": times["their_first_s"],
        "blocks": {
            "our_s": times["ours"],
            "their_s": times["theirs"],
            "our_tokens": our_tokens,
            "their_tokens": their_tokens,
        },
    }


def _loss_difference(ours: OurTrainer, theirs: TheirTrainer, rows: TokenRows) -> float:
    """The largest relative difference of a batch's loss, from the weights that mlx-lm has come to."""
    weights = theirs.weights
    differences = []
    for group in islice(ours.groups(), LOSS_BATCHES):
        reference = theirs.loss(exactly_supervised(their_rows(rows, group.batches[0].rows)))
        ours.take(weights)
        differences.append(abs(ours.step(group) - reference) / abs(reference))
    return max(differences)


if __name__ == "__main__":
    print(json.dumps(peaks(sys.argv[1], Cell(**json.loads(sys.argv[2])))))
