"""What `tunesmith harness` prints: a line a figure, base beside tuned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from flows.harness import Scores

STDERR = "_stderr"


def print_scores(console: Console, scores: Scores) -> None:
    """Figures with the standard error of each, and their difference."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for heading in ("", "base", "tuned", "change"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, tuned in scores.tuned.items():
        if STDERR not in name:
            base = scores.base[name]
            shown = (_with_error(name, each) for each in (scores.base, scores.tuned))
            table.add_row(name, *shown, f"{tuned - base:+.4f}")
    console.print(table)


def _with_error(name: str, figures: Mapping[str, float]) -> str:
    """A figure as `0.5312 ± 0.0210`; without the error where the harness gives none."""
    task, metric, *chosen = name.split("/")
    error = figures.get("/".join((task, metric + STDERR, *chosen)))
    return f"{figures[name]:.4f}" + (f" ± {error:.4f}" if error is not None and math.isfinite(error) else "")
