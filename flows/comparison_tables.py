"""What `tunesmith evaluate` and `tunesmith compare` print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.compare import Comparison, best, shown

if TYPE_CHECKING:
    from flows.evaluate import Measured

BENEATH = (
    "its change from the base (or the first model) and the 95% interval, in colour where it is more "
    "than chance in the choice of the rows."
)
OTHER_DATA = (
    "The runs have different data, and different test rows: 'tunesmith evaluate' with --data measures them "
    "on the same."
)
MARKS = {True: "green", False: "red", None: ""}


def print_measured(console: Console, measured: Sequence[Measured]) -> None:
    """A line a figure, a column a model; beneath a tuned model's figure, how it changed from its base."""
    from tasks.evaluate.side_by_side import better, numbers
    from tasks.evaluate.summary import MEANINGS, change, number

    table = _table("", *[one.name for one in measured])
    found = {name for one in measured for name in numbers(one.figures)}
    for name in [*MEANINGS, *sorted(found - MEANINGS.keys())]:
        if name not in found:
            continue
        cells = []
        for one in measured:
            cell = Text(number(name, one.figures[name]) if name in one.figures else "")
            if interval := one.changes.get(name):
                cell.append(f"\n{change(name, interval)}", MARKS[better(name, interval)] or "dim")
            cells.append(cell)
        table.add_row(MEANINGS.get(name, name), *cells)
    console.print(table)
    rows = len(measured[0].figures["rows"])
    _line(console, f"{rows:,} rows. Beneath a figure: {BENEATH}")
    if len({one.tokens for one in measured}) > 1:
        _line(console, "Not all tokenise the rows alike: their losses, by token, do not compare.", "yellow")
    for one in measured:
        if one.seen:
            _line(console, f"{one.name} was trained on {one.seen:,} of these rows.", "yellow")


def print_comparison(console: Console, comparison: Comparison) -> None:
    """The settings that differ, and the figures that moved, the best of each in green."""
    for title, rows in (("settings", comparison.settings), ("figures", comparison.figures)):
        table = _table(title, *comparison.runs)
        for name, values in rows.items():
            table.add_row(name, *_cells(name, values))
        if rows:
            console.print(table)
        else:
            _line(console, f"No {title} differ.")
    if not comparison.same_data:
        _line(console, OTHER_DATA, "yellow")


def _cells(name: str, values: Sequence[str | float | None]) -> list[Text]:
    figures = [value for value in values if isinstance(value, float)]
    top = shown(best(name, figures)) if figures else None
    cells = []
    for value in values:
        text = shown(value) if isinstance(value, float) else value or ""
        cells.append(Text(text, style="green" if figures and text and text == top else ""))
    return cells


def _line(console: Console, text: str, style: str = "dim") -> None:
    console.print(Text(text, style=style), highlight=False)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column(headings[0])
    for heading in headings[1:]:
        table.add_column(Text(heading), justify="right")
    return table
