"""What `tunesmith compare` does: in which settings runs differ, and which of their figures moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flows.find_run import find_run
from tasks.config import TrackingSettings
from tasks.errors import InputError
from tasks.evaluate.text_metrics import LOWER_IS_BETTER
from tasks.tracking import Record, read_record

FIRST = ("best_val_loss", "test_loss", "test/", "base/")
"""Figures, or their beginnings, in the order in which they are shown; others follow."""

PASSING = (
    "change/",
    "learning_rate",
    "epoch",
    "grad_norm",
    "train_loss",
    "val_loss",
    "iterations_per_second",
)
"""Figures whose last value says nothing of the run as a whole, or that are shown in another form."""

LOWER = LOWER_IS_BETTER | {"best_val_loss", "peak_memory"}
HIGHER = {
    "token_accuracy", "chrf", "rouge_l", "bleu", "exact_match", "exact_match_normalised", "format_valid",
    "tokens_per_second",
}  # fmt: skip
"""Figures of which a lower, or a higher one is better; of others there is no best."""

DATA_TAG = "tunesmith.data"


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: names with the beginnings of their ids.
        settings: those that differ, each with its value in every run; None where a run has no such.
        figures: those that moved, likewise.
        same_data: all runs were trained and tested on the same prepared data.
    """

    runs: list[str]
    settings: dict[str, list[str | None]]
    figures: dict[str, list[float | None]]
    same_data: bool

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        return asdict(self)


def compare_runs(references: Sequence[str]) -> Comparison:
    """Compare runs of the store.

    Args:
        references: of at least two different runs: ids, beginnings of ids, or names.

    Raises:
        InputError: one is not there, or there are fewer than two different ones.
    """
    found = [find_run(reference, TrackingSettings()) for reference in references]
    runs = list({run.id: run for run in found}.values())
    if len(runs) < 2:
        raise InputError(f"{len(runs)} run to compare: give at least two different ones")
    records = [read_record(TrackingSettings(), run.id) for run in runs]
    data = {record.tags.get(DATA_TAG) for record in records}
    return Comparison(
        [f"{run.name} ({run.id[:8]})" for run in runs],
        _different([record.params for record in records]),
        _moved(records),
        len(data) == 1 and None not in data,
    )


def best(name: str, values: Sequence[float | None]) -> float | None:
    """The best of the values of a figure; None where no value is better than another."""
    kind = name.rpartition("/")[2]
    known = [value for value in values if value is not None]
    if kind in LOWER:
        return min(known)
    return max(known) if kind in HIGHER else None


def shown(value: float | None) -> str:
    """A figure in four digits, by which one that moved differs."""
    return "" if value is None else f"{value:.4g}"


def _different(params: Sequence[Mapping[str, str]]) -> dict[str, list[str | None]]:
    names = dict.fromkeys(name for one in params for name in one)
    rows = {name: [one.get(name) for one in params] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1 and name != "name"}


def _moved(records: Sequence[Record]) -> dict[str, list[float | None]]:
    names = {name for record in records for name in record.metrics if not name.startswith(PASSING)}
    rows = {name: [record.metrics.get(name) for record in records] for name in sorted(names, key=_place)}
    return {name: values for name, values in rows.items() if len({shown(value) for value in values}) > 1}


def _place(name: str) -> tuple[int, str]:
    return next((at for at, first in enumerate(FIRST) if name.startswith(first)), len(FIRST)), name
