"""The memory model beside real runs: how far the predicted peak is from the measured one.

    python benchmarks/memory_model.py --quick              # six small runs of the bundled model: 2 minutes
    python benchmarks/memory_model.py                      # every cell for this machine
    python benchmarks/memory_model.py --predict            # the kept cells again, after a change of the model
    python benchmarks/memory_model.py --fit                # the errors of the cells that are kept
    python benchmarks/memory_model.py --budget --runs 100  # settings accepted under a budget, and their peaks

Each run is the product's own (`without_frozen_layers`, then `fit`, on a GPU held to what was predicted), of
two updates and two validations on made rows of one length, in a process of its own: where memory ends, a CPU
build of MLX ends the process. The measured peak is `mx.get_peak_memory` from the loaded base on, in two
phases: making ready (frozen prefix, first look) and training; the larger is the run's. Base models are the
bundled one and random weights in the shapes of others (`step_models.py`): float32 on CPU, bfloat16 or 4 bits
on a GPU.

A quarter of the cells, fixed by their names, is held out: the one constant (`Pace.crest`, on GPUs) is chosen
by the others, errors are of the held-out ones (`median_error`, `max_error`, `worst_underprediction`), and of
all (`…_of_all`). Cells are kept in a file as they are measured; a run that was cut off goes on from there.

`--budget` draws settings at random until the model has accepted as many as wanted, each under a budget
drawn with it, less a margin of 1 GB, runs them, and counts those that went over (`over_budget`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import bare_engine  # noqa: F401
import numpy as np
from memory_cells import Cell, accepted, predict
from record import commit, kept_cells, machine_name, record
from step_models import BUNDLED

from tasks.models.device import on_gpu
from tasks.train.memory.backends import pace

CELLS_SEED, BUDGET_SEED = 6, 7
MARGIN_BYTES = 1_000_000_000

CPU_TOKENS = {BUNDLED: 2048, "smollm2-360m": 768}
"""Positions a batch at most, so that a run takes a minute at most."""

GPU_TOKENS = 16384
ALL_LAYERS_TOKENS = 8192
"""On a GPU, of all layers without checkpointing: else a 3B model takes more memory than there is."""


def main() -> None:
    """Run, measure, record."""
    chosen = _arguments()
    kind = "memory_budget" if chosen.budget else "memory_model"
    file = chosen.cells or Path("build") / f"{kind}-{machine_name()}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    wanted = _budget_cells(chosen) if chosen.budget else _grid(chosen)
    if not (chosen.fit or chosen.predict):
        _measure(wanted, file, chosen.minutes)
    if chosen.predict:
        _predict_again(file)
    found = kept_cells(file)
    if chosen.budget:
        figures = _budget_figures([found[cell.key] for cell in wanted if cell.key in found])
    else:
        figures = _judged(list(found.values()))
    record(kind, figures, chosen.quick, list(found.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=lambda text: text.split(","), help="of step_models.py")
    parser.add_argument("--bases", type=lambda text: text.split(","), help="of lora, qlora")
    parser.add_argument("--runs", type=int, help="cells, drawn at random from the grid")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument("--cells", type=Path, help="the file that measured cells are kept in")
    parser.add_argument("--fit", action="store_true", help="measure nothing: fit and judge what is kept")
    parser.add_argument(
        "--predict", action="store_true", help="measure nothing: predict all that is kept anew"
    )
    parser.add_argument("--budget", action="store_true", help="runs accepted under a budget")
    parser.add_argument("--quick", action="store_true", help="few and small")
    chosen = parser.parse_args()
    gpu = on_gpu()
    chosen.models = chosen.models or (["tinyllama-1.1b", "llama-3.2-3b"] if gpu else list(CPU_TOKENS))
    chosen.bases = chosen.bases or (["lora", "qlora"] if gpu else ["lora"])
    if chosen.quick:
        chosen.models, chosen.bases = chosen.models[:1], chosen.bases[:1]
    chosen.runs = chosen.runs or (6 if chosen.quick else 100 if chosen.budget else 72)
    return chosen


def _grid(chosen: argparse.Namespace) -> list[Cell]:
    """So many cells of each base, as many of each model, drawn from all axes."""
    random = np.random.default_rng(CELLS_SEED)
    bases = [(model, base) for model in chosen.models for base in chosen.bases]
    cells: list[Cell] = []
    for number, (model, base) in enumerate(bases):
        count = chosen.runs * (number + 1) // len(bases) - chosen.runs * number // len(bases)
        cells += _drawn(random, model, base, count, chosen.quick)
    return cells


def _drawn(random: np.random.Generator, model: str, base: str, count: int, quick: bool) -> list[Cell]:
    cells: dict[str, Cell] = {}
    while len(cells) < count:
        cell = _random_cell(random, model, base, quick)
        if _affordable(cell, quick):
            cells[cell.key] = cell
    return list(cells.values())


def _random_cell(random: np.random.Generator, model: str, base: str, quick: bool) -> Cell:
    def one_of(choices: Sequence[Any]) -> Any:
        return choices[int(random.integers(len(choices)))]

    method = one_of(["lora"] * 8 + ["dora", "soft-prompt"])
    return Cell(
        model,
        base,
        method,
        layers=one_of([1, 4, 8, 16, -1]),
        rank=one_of([4, 8, 32, 64]),
        batch_size=one_of([1, 2] if quick else [1, 2, 4, 8]),
        length=one_of([64, 128] if quick else [128, 256, 512, 1024, 2048]),
        prompt_percent=one_of([0, 50, 80]),
        checkpoint=bool(random.integers(3) == 0),
        prefix=bool(random.integers(3) != 0),
        accumulation=one_of([1, 1, 1, 2]),
        optimizer=one_of(["adamw"] * 6 + ["sgd", "lion", "adafactor", "muon"]),
    )


def _affordable(cell: Cell, quick: bool) -> bool:
    tokens = cell.batch_size * cell.length
    if not on_gpu():
        return tokens <= (256 if quick else CPU_TOKENS[cell.model])
    deep = cell.layers in (-1, 16) or cell.method == "soft-prompt"
    return tokens <= (ALL_LAYERS_TOKENS if deep and not cell.checkpoint else GPU_TOKENS)


def _measure(wanted: Iterable[Cell], file: Path, minutes: float) -> None:
    """Measure what is not kept yet; on a GPU the cells of one base in one process, which starts slowly."""
    started = time.perf_counter()
    kept = kept_cells(file)
    todo = [cell for cell in wanted if cell.key not in kept]
    for _, same in groupby(todo, lambda cell: (cell.model, cell.base) if on_gpu() else cell.key):
        left = list(same)
        while left and time.perf_counter() - started < 60 * minutes:
            done = set()
            for line in _of_a_process(left, 60 * minutes - (time.perf_counter() - started)):
                _keep(file, cell := json.loads(line))
                done.add(cell["key"])
            if not done:
                print(f"{left[0].key}: the process ended without a result", flush=True)
            last = max((place for place, cell in enumerate(left) if cell.key in done), default=0)
            left = left[last + 1 :]  # one that failed among them is not tried again now


def _of_a_process(cells: Sequence[Cell], seconds: float) -> Iterator[str]:
    """The lines that a process measuring the cells prints, until it ends or its time does."""
    command = [sys.executable, str(Path(__file__).with_name("memory_cells.py"))]
    command += [json.dumps(asdict(cell)) for cell in cells]
    deadline = time.perf_counter() + seconds
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith("{"):
                yield line
            if time.perf_counter() > deadline:
                process.kill()
                return


def _keep(file: Path, cell: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" + json.dumps({**cell, "commit": commit()}) + "\n")  # the line before may be cut off
    print(_in_words(cell), flush=True)


def _predict_again(file: Path) -> None:
    """The cells kept with what the model as it is now makes of them; on the kind of machine they are of."""
    for cell in kept_cells(file).values():
        _, predicted = predict(_as_cell(cell))
        _keep(file, {**cell, "predicted": predicted})


def predicted_bytes(cell: Mapping[str, Any], crest: int) -> int:
    """The peak that the model gives with this constant."""
    return max(sum(parts.values()) for parts in cell["predicted"][str(crest)].values())


def measured_bytes(cell: Mapping[str, Any]) -> int:
    """The run's peak."""
    return max(int(value) for value in cell["measured"].values())


def errors(cells: Sequence[Mapping[str, Any]], crest: int) -> list[float]:
    """Predicted over measured, less one."""
    return [predicted_bytes(cell, crest) / measured_bytes(cell) - 1 for cell in cells]


def _judged(cells: list[dict[str, Any]]) -> dict[str, float]:
    """The errors of the product's constant, and what the cells that are not held out make of it."""
    held_out = [cell for cell in cells if _as_cell(cell).held_out]
    others = [cell for cell in cells if not _as_cell(cell).held_out] or cells
    crest = pace().crest
    print(f"crest {crest}; best for {len(others)} of {len(cells)} runs: {best_crest(others)}")
    figures: dict[str, float] = {"runs": len(cells), "held_out": len(held_out)}
    for name, some in (("", held_out or cells), ("_of_all", cells)):
        found = errors(some, crest)
        figures[f"median_error{name}"] = statistics.median(map(abs, found))
        figures[f"max_error{name}"] = max(map(abs, found))
        figures[f"worst_underprediction{name}"] = max(0.0, -min(found))
    for cell, error in sorted(zip(cells, errors(cells, crest), strict=True), key=lambda each: each[1]):
        if abs(error) > 0.03:
            print(f"{error:+.1%}  {cell['key']}")
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def best_crest(cells: Sequence[Mapping[str, Any]]) -> int:
    """Of those predicted for, the one with the least worst error."""
    return min(map(int, cells[0]["predicted"]), key=lambda crest: max(map(abs, errors(cells, crest))))


def _budget_cells(chosen: argparse.Namespace) -> list[Cell]:
    """Settings that the model accepts under the budgets drawn with them."""
    random = np.random.default_rng(BUDGET_SEED)
    found: dict[str, Cell] = {}
    while len(found) < chosen.runs:
        model = chosen.models[int(random.integers(len(chosen.models)))]
        base = chosen.bases[int(random.integers(len(chosen.bases)))]
        cell = _random_cell(random, model, base, chosen.quick)
        budget = random.uniform(*_budget_range()) * 1e9
        if _affordable(cell, chosen.quick) and accepted(cell, budget - MARGIN_BYTES):
            found[cell.key] = replace(cell, budget_gb=budget / 1e9)
    return list(found.values())


def _budget_range() -> tuple[float, float]:
    return (4.0, 60.0) if on_gpu() else (1.5, 7.0)


def _budget_figures(cells: list[dict[str, Any]]) -> dict[str, float]:
    over = [cell for cell in cells if measured_bytes(cell) > 1e9 * cell["budget_gb"]]
    nearest = min((1e9 * cell["budget_gb"] - measured_bytes(cell) for cell in cells), default=0.0)
    for cell in over:
        print(f"over: {cell['key']}: {measured_bytes(cell) / 1e9:.2f} GB of {cell['budget_gb']:.2f}")
    return {"runs": len(cells), "over_budget": len(over), "least_room_gb": round(nearest / 1e9, 3)}


def _as_cell(kept: Mapping[str, Any]) -> Cell:
    return Cell(**{name: kept[name] for name in asdict(Cell("")) if name in kept})


def _in_words(cell: Mapping[str, Any]) -> str:
    predicted, measured = predicted_bytes(cell, pace().crest), measured_bytes(cell)
    return f"{predicted / measured - 1:+7.2%}  {measured / 1e9:6.2f} GB  {cell['key']}"


if __name__ == "__main__":
    main()
