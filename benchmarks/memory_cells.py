"""One real run each: its peak memory by phase, and what the memory model makes of the same cell.

    python benchmarks/memory_cells.py JSON…     # cells as JSON objects; a line of JSON for each that is done

A process of its own for each cell, or for several that are measured one after the other.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import traceback
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import bare_engine  # noqa: F401
import mlx.core as mx
from step_models import as_ours, config_of, make_base
from step_rows import made_rows
from step_trainers import cache_of_its_own

from tasks.config import TrainSettings
from tasks.models.load import use_fast_code
from tasks.train import supervised
from tasks.train.adapters import adapter_config, add_adapter
from tasks.train.frozen_prefix import without_frozen_layers
from tasks.train.loop import fit
from tasks.train.memory.backends import pace
from tasks.train.memory.estimate import MemoryEstimate, estimate_from_config, limit_bytes, phases
from tasks.train.memory.row_sizes import RowSizes
from tasks.train.memory_guard import holding_back
from tasks.train.targets import target_keys

UPDATES = 2
"""The peak of later ones is that of the second."""

CRESTS = (1, 2, 3, 5)
"""Of `Pace`: predictions are kept for each on a GPU, so that the constant can be found afterwards."""


@dataclass(frozen=True)
class Cell:
    """A short run.

    Attributes:
        base: "lora" for a base that is not quantised, "qlora" for one of 4 bits, as `make_base` has it.
        layers: adapted, from the top; -1 for all.
        length: positions of a row.
        budget_gb: that it was accepted under, if it was.
    """

    model: str
    base: str = "lora"
    method: str = "lora"
    layers: int = 8
    rank: int = 8
    batch_size: int = 4
    length: int = 256
    prompt_percent: int = 50
    checkpoint: bool = False
    prefix: bool = True
    accumulation: int = 1
    optimizer: str = "adamw"
    budget_gb: float = 0.0

    @property
    def key(self) -> str:
        """Short, readable, and unlike that of any other cell."""
        flags = [name for name in ("checkpoint", "prefix") if getattr(self, name)]
        depth = "all" if self.layers == -1 else str(self.layers)
        return (
            f"{self.model} {self.base} {self.method} k={depth} r={self.rank} b={self.batch_size} "
            f"{self.length}x{self.prompt_percent}% a={self.accumulation} {self.optimizer} {' '.join(flags)}"
        ).strip()

    @property
    def held_out(self) -> bool:
        """Whether no constant may be fitted to it: a fixed quarter of all cells."""
        return hashlib.sha256(self.key.encode()).digest()[0] % 4 == 0

    def settings(self) -> TrainSettings:
        """The product's."""
        return TrainSettings(
            method=self.method,
            num_layers=self.layers,
            rank=self.rank,
            batch_size=self.batch_size,
            accumulation_steps=self.accumulation,
            grad_checkpoint=self.checkpoint,
            frozen_prefix="always" if self.prefix else "never",
            prefix_cache_gb=1000,
            optimizer=self.optimizer,
            max_steps=UPDATES,
            epochs=UPDATES,
        )


def measure(cell: Cell, limit: int | None) -> dict[str, int]:
    """Bytes at the peak of making ready (the frozen prefix, the first look), and of the training after it.

    Args:
        limit: what the run is held to, as the product does.
    """
    supervised._verdicts.clear()  # what an earlier cell of this process has found out
    settings = cell.settings()
    rows = made_rows(cell.model, cell.batch_size * cell.accumulation, cell.length, cell.prompt_percent)
    network = as_ours(make_base(cell.model, cell.base)).copy()
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    with cache_of_its_own(), nullcontext() if limit is None else holding_back(limit):
        use_fast_code(network)
        keys = target_keys(network, settings.targets, settings.num_layers)
        add_adapter(network, adapter_config(settings, len(network.layers), keys), settings.seed)
        splits = without_frozen_layers(network, {"train": rows, "valid": rows}, settings, {"rows": cell.key})
        ready = mx.get_peak_memory()
        training = fit(network, splits["train"], splits["valid"], settings, lambda step, metrics: None)
    return {"ready": ready, "training": round(training.peak_memory * 1e9)}


def predict(cell: Cell) -> tuple[int | None, dict[str, Any]]:
    """What the run is to be held to; and its phases and their parts, without calibration, by `Pace.crest`."""
    work = phases(cell.settings(), base_config(cell), _sizes(cell))
    limit = limit_bytes(work)
    ours = pace() if limit is None else replace(pace(), limit_bytes=limit)
    return limit, {
        str(crest): {each.name: each.replayed(replace(ours, crest=crest)).parts() for each in work}
        for crest in ([ours.crest] if limit is None else CRESTS)
    }


def accepted(cell: Cell, budget_bytes: float) -> bool:
    """Whether the model finds that the cell stays within so much, as calibrated on this machine."""
    return estimated(cell).peak_bytes <= budget_bytes


def estimated(cell: Cell) -> MemoryEstimate:
    """What a person is told of the cell."""
    return estimate_from_config(cell.settings(), base_config(cell), _sizes(cell))


def base_config(cell: Cell) -> dict[str, Any]:
    """The base's `config.json`, as `make_base` makes it."""
    config = {**config_of(cell.model), "dtype": "bfloat16"}
    if cell.base == "qlora":
        config["quantization"] = {"bits": 4, "group_size": 64}
    return config


def _sizes(cell: Cell) -> RowSizes:
    supervised = cell.length - round(cell.prompt_percent / 100 * cell.length)
    return RowSizes.alike(cell.length + 1, supervised, cell.batch_size * cell.accumulation)


def main() -> None:
    """Measure and predict the cells given, in order."""
    for text in sys.argv[1:]:
        cell = Cell(**json.loads(text))
        try:
            limit, predicted = predict(cell)
            done = {"key": cell.key, **asdict(cell), "limit": limit, "predicted": predicted}
            done["measured"] = measure(cell, limit)
        except (RuntimeError, ValueError):  # where a GPU's memory ends, MLX raises
            traceback.print_exc()
            continue
        gc.collect()
        mx.clear_cache()
        print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
