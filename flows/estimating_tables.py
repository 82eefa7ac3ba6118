"""Tables of `tunesmith estimate`."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from flows.estimating import Told
from tasks.models.device import device_name, on_gpu
from tasks.train.memory.estimate import PARTS

GB = 1e9

LEAST_SHARE = 0.01
"""Of the highest peak: parts that never reach it have no column."""


def print_estimate(console: Console, told: Told) -> None:
    """The phases of a run with their parts, whether it fits, and what would."""
    least = LEAST_SHARE * max(parts.bytes for parts in told.phases.values())
    shown = [
        part for part in PARTS if any(abs(getattr(parts, part)) >= least for parts in told.phases.values())
    ]
    table = Table("GB", title=f"peak memory on {device_name()}")
    for name in (*shown, "together"):
        table.add_column(name, justify="right")
    for phase, parts in told.phases.items():
        sizes = [*(getattr(parts, part) for part in shown), parts.bytes]
        table.add_row(phase, *(f"{size / GB:.2f}" for size in sizes))
        if phase == list(told.estimate.phases)[-1]:
            table.add_section()
    console.print(table)
    peak, budget = told.estimate.peak_bytes / GB, told.budget_bytes / GB
    verdict = "over" if told.is_over else "within"
    console.print(
        f"{peak:.2f} GB while {told.estimate.phase}: {verdict} the budget of {budget:.2f} GB", highlight=False
    )
    for name in told.over_afterwards:
        size = told.phases[name].bytes / GB
        told_of = f"{size:.2f} GB while {name}, after the training: over the budget of the training"
        console.print(told_of, highlight=False)
    console.print(f"rows: {told.rows}", highlight=False, markup=False)
    _print_changes(console, told)
    _print_fits(console, told)


def print_table(console: Console, found: Mapping[str, Mapping[str, int]], length: int) -> None:
    """Peak memory by model and method."""
    methods = next(iter(found.values()))
    title = f"GB on {device_name()}: all layers, one row of {length} tokens a batch, gradient checkpointing"
    table = Table("model", *methods, title=title)
    for name, peaks in found.items():
        table.add_row(name, *(f"{peaks[method] / GB:.1f}" for method in methods))
    console.print(table)


def _print_changes(console: Console, told: Told) -> None:
    if not told.is_over:
        return
    if not told.changes:
        console.print("no change of settings fits: take a smaller base, or raise train.budget")
        return
    console.print("to fit, in the order that costs least quality:")
    for change in told.changes:
        console.print(
            f"  {' '.join(change.overrides)}  →  {change.peak_bytes / GB:.2f} GB ({change.why})",
            highlight=False,
            markup=False,
        )


def _print_fits(console: Console, told: Told) -> None:
    if not told.fits:
        return
    table = Table("the largest that fits")
    for bits in dict.fromkeys(each.bits for each in told.fits):
        base = "" if bits is None else f"{bits} bits, "
        table.add_column(f"{base}as set")
        table.add_column(f"{base}with train.grad_checkpoint")
    for setting in dict.fromkeys(each.setting for each in told.fits):
        found = [each for each in told.fits if each.setting == setting]
        values = [value for each in found for value in (each.plain, each.checkpointed)]
        table.add_row(setting, *("none" if value is None else f"{value:,}" for value in values))
    console.print(table)
    if not on_gpu():
        console.print("a base of 16, 8 or 4 bits takes the same here: a CPU holds it as float32")
