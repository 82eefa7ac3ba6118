"""A training step beside mlx-lm's own: tokens a second, peak memory, and whether the losses are the same.

    python benchmarks/train_step.py --quick                   # the bundled model, k = 1, 8 and all: 3 minutes
    python benchmarks/train_step.py --rows stdlib --curves    # real chats, and 100 steps side by side
    python benchmarks/train_step.py                           # every cell for this machine
    python benchmarks/train_step.py --table                   # the measured cells as Markdown

mlx-lm's `mlx_lm.tuner.trainer.train` is run as it is, with its own padding (`iterate_batches`), from the
same adapter weights and with the same optimizer; Tunesmith's engine takes turns with it in one process, in
blocks of a few steps, the making of batches included on either side. A step of each shape is run before, and
timed apart (`our_first_s`, `their_first_s`: compilation), and so is the one pass through the frozen layers
(`prefix_s`). Peak memory is that of a process of its own for either side.

Rows are made, all of one length, the same rows in the same order for both; or (`--rows stdlib`) the built-in
chats as the product prepares them: there each side forms and pads its batches of the same rows by itself.
Base models are the bundled one and random weights in the shapes of others (`step_models.py`): float32 on
CPU, bfloat16 on a GPU, 4 bits for qlora. On CPU, where quantised products are slow, Tunesmith holds a 4-bit
base as float32, and mlx-lm as it is. What Tunesmith sets for its whole process on Linux, so that freed
memory is kept, here speeds up mlx-lm too; `whole_run.py` has processes of their own.

`share_of_arithmetic` is the ratio over what matrix products allow, (1 + f + 2h) / (2f + 2hc), with f the
adapted share of the layers, h the vocabulary projection over the body and c the supervised share of the
positions. `max_loss_difference` is relative, of a batch's loss in a step from equal weights; both sides then
leave out the padding token that mlx-lm supervises in padded rows.

Cells are kept in a file as they are measured, and a run that was cut off, or asked for other cells, goes on
from there; once the code of `tasks/train` has changed, all are measured again. The figures are of all cells
kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import bare_engine  # noqa: F401
import mlx.core as mx
from record import commit, kept_cells, machine_name, record
from step_cells import (
    ALL,
    CURVE_BATCH,
    CURVE_LENGTH,
    STDLIB,
    SYNTHETIC,
    Cell,
    measure_curves,
    measure_memory,
    measure_step,
    measure_validation,
)
from step_models import BUNDLED, METHODS, MODELS, SHAPES, Base, as_ours, config_of, make_base
from step_rows import Chats, chats
from step_table import figures_of, in_words, markdown

from tasks.models.device import on_gpu
from tasks.publish import code_version

VALIDATION_ROWS = 64


def main() -> None:
    """Run, measure, record."""
    chosen = _arguments()
    file = chosen.cells or Path("build") / f"train_step-{machine_name()}.jsonl"
    if chosen.table:
        print(markdown(list(kept_cells(file).values())))
        return
    started = time.perf_counter()
    file.parent.mkdir(parents=True, exist_ok=True)
    code = code_version("train")
    measured = {key: cell for key, cell in kept_cells(file).items() if cell["code"] == code}
    wanted = list(_cells(chosen))
    for model, method in dict.fromkeys((cell.model, cell.method) for cell in wanted):
        todo = [cell for cell in wanted if (cell.model, cell.method) == (model, method)]
        todo = [cell for cell in todo if cell.key not in measured]
        for done in _measure(todo, chosen, started):
            measured[done["key"]] = done = {**done, "code": code, "commit": commit()}
            with file.open("a", encoding="utf-8") as lines:
                lines.write("\n" + json.dumps(done) + "\n")  # the line before may have been cut off
            print(in_words(done), flush=True)
    if left := [cell.key for cell in wanted if cell.key not in measured]:
        print(f"{len(left)} of {len(wanted)} cells are left: run again to go on")
    found = list(measured.values())
    print(markdown(found))
    record("train_step", figures_of(found), chosen.quick or "tiny" in chosen.models, found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=_words, help=f"of {', '.join([*MODELS, 'tiny'])}")
    parser.add_argument("--methods", type=_words, help="of lora, qlora")
    parser.add_argument("--layers", type=_depths, help="as 1,4,8,16,all")
    parser.add_argument("--batches", type=_numbers, help="rows a batch, as 1,4")
    parser.add_argument("--prompts", type=_numbers, help="percent not supervised, as 0,50,80")
    parser.add_argument("--length", type=_numbers, help="positions of a row, as 512,2048")
    parser.add_argument("--rows", type=_words, default=[SYNTHETIC], help="of synthetic, stdlib")
    parser.add_argument("--steps", type=int, help="timed, of either side, in each cell")
    parser.add_argument("--memory", choices=("none", "some", "all"), help="some: where rows are longest")
    parser.add_argument("--curves", action="store_true", help="100 steps of either side, side by side")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument("--cells", type=Path, help="the file that measured cells are kept in")
    parser.add_argument("--table", action="store_true", help="print the measured cells as Markdown")
    parser.add_argument("--quick", action="store_true", help="one small cell a depth")
    chosen = parser.parse_args()
    for name, value in (_QUICK if chosen.quick else _whole()).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    return chosen


_QUICK: dict[str, Any] = {
    "models": [BUNDLED],
    "methods": ["lora"],
    "layers": [1, 8, ALL],
    "batches": [4],
    "prompts": [50],
    "length": [64],
    "steps": 3,
    "memory": "none",
}


def _whole() -> dict[str, Any]:
    """Everything that is worth its time on this machine: large models and 4 bits are not on CPU."""
    gpu = on_gpu()
    return {
        "models": list(MODELS) if gpu else [BUNDLED],
        "methods": list(METHODS) if gpu else ["lora"],
        "layers": [1, 4, 8, 16, ALL],
        "batches": [1, 4],
        "prompts": [0, 50, 80],
        "length": [512, 2048] if gpu else [256],
        "steps": 24 if gpu else 12,
        "memory": "some",
    }


def _cells(chosen: argparse.Namespace) -> Iterator[Cell]:
    """All that was chosen, those of one base together; a depth beyond a model's layers is left out."""
    for model, method in product(chosen.models, chosen.methods):
        layers = config_of(model)["num_hidden_layers"]
        depths = [depth for depth in chosen.layers if depth < layers]
        for rows in chosen.rows:
            if rows == STDLIB and model == BUNDLED:
                yield from (Cell("step", model, method, depth, 4, rows=STDLIB) for depth in depths)
                yield Cell("validation", model, method, 8, 4, rows=STDLIB)
            elif rows == SYNTHETIC:
                axes = list(product(chosen.length, chosen.batches, depths, chosen.prompts))
                for length, batch, depth, prompt in axes:
                    yield Cell("step", model, method, depth, batch, length, prompt)
                longest, largest = max(chosen.length), max(chosen.batches)
                if 8 in depths:
                    yield Cell("validation", model, method, 8, largest, longest, 50)
                for length, batch, depth, prompt in axes:
                    some = (length, batch, prompt) == (longest, largest, 50)
                    if chosen.memory == "all" or (chosen.memory == "some" and some):
                        yield Cell("memory", model, method, depth, batch, length, prompt)
        if chosen.curves:
            yield Cell("curves", model, method, min(8, layers), CURVE_BATCH, CURVE_LENGTH, 50)


def _measure(todo: list[Cell], chosen: argparse.Namespace, started: float) -> Iterator[dict[str, Any]]:
    """The cells of one base, one after another, with the base in memory once where it is needed."""
    held: Chats | None = None
    bases: tuple[Base, Base] | None = None
    for cell in todo:
        if time.perf_counter() - started > 60 * chosen.minutes:
            return
        if cell.kind == "memory":
            bases = None  # one after the other: each side's process makes its own
        elif bases is None:
            theirs = make_base(cell.model, cell.method)
            bases = (as_ours(theirs), theirs)
            del theirs
        if cell.rows == STDLIB:
            held = held or chats(VALIDATION_ROWS)
        figures = _figures(cell, bases, held if cell.rows == STDLIB else None, chosen)
        yield {"key": cell.key, **asdict(cell), "base": _base_in_words(cell), **figures}
        gc.collect()
        mx.clear_cache()


def _figures(
    cell: Cell, bases: tuple[Base, Base] | None, held: Chats | None, chosen: argparse.Namespace
) -> dict[str, Any]:
    if bases is None:
        return measure_memory(cell)
    if cell.kind == "curves":
        return measure_curves(cell, bases, 10 if chosen.quick else 100)
    if cell.kind == "validation":
        return measure_validation(cell, bases, held, 1 if chosen.quick else 3)
    return measure_step(cell, bases, held, chosen.steps)


def _base_in_words(cell: Cell) -> str:
    return "4 bits" if cell.method == "qlora" else ("bfloat16" if on_gpu() else "float32")


def _words(text: str) -> list[str]:
    words = text.split(",")
    known = {*MODELS, *SHAPES, *METHODS, SYNTHETIC, STDLIB}
    if odd := [word for word in words if word not in known]:
        raise argparse.ArgumentTypeError(f"{odd[0]!r} is none of {', '.join(sorted(known))}")
    return words


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _depths(text: str) -> list[int]:
    return [ALL if word == "all" else int(word) for word in text.split(",")]


if __name__ == "__main__":
    main()
