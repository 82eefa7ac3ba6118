"""`tunesmith runs`: a line a run, the newest first."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from flows.registered import age
from tasks.run_records import RunRecord

FIGURES = {
    "best_val_loss": ("val loss", "{:.4f}"),
    "test_loss": ("test loss", "{:.4f}"),
    "test/chrf": ("chrF", "{:.1f}"),
    "peak_memory": ("memory", "{:.2f} GB"),
}
"""Shown where a run has them; --json has all."""

STYLES = {"RUNNING": "cyan", "FINISHED": "", "FAILED": "red", "KILLED": "yellow", "DEAD": "yellow"}


def print_runs(console: Console, records: Sequence[RunRecord]) -> None:
    """The table, the best of each figure in bold, and what to type next."""
    shown = [name for name in FIGURES if any(name in record.figures for record in records)]
    best = {name: _best(name, records) for name in shown}
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column("run", overflow="fold")
    for heading in ("id", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in (*(FIGURES[name][0] for name in shown), "time", "age"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        cells = [_figure(record, name, best[name]) for name in shown]
        state = (
            f"[{style}]{record.state.lower()}"
            if (style := STYLES.get(record.state))
            else record.state.lower()
        )
        name = ("  " if record.parent else "") + record.name.replace("[", "\\[")
        table.add_row(name, record.id[:8], state, *cells, duration(record), age(record.started_ms))
    console.print(table)


def duration(record: RunRecord) -> str:
    """How long it took, or has taken so far."""
    if record.state == "DEAD":
        return ""
    ended_ms = record.ended_ms or int(1000 * time.time())
    seconds = max(0, ended_ms - record.started_ms) / 1000
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5940 else f"{seconds / 3600:.1f} h"


def _best(name: str, records: Sequence[RunRecord]) -> float | None:
    """Of several; of one run nothing is the best."""
    values = [record.figures[name] for record in records if name in record.figures]
    if len(set(values)) < 2 or name == "peak_memory":
        return None
    return max(values) if name == "test/chrf" else min(values)


def _figure(record: RunRecord, name: str, best: float | None) -> str:
    if name not in record.figures:
        return ""
    text = FIGURES[name][1].format(record.figures[name])
    return f"[bold]{text}" if record.figures[name] == best else text
