"""What the commands print when they are done."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from flows.doctor import Check
    from flows.finetune import Outcome
    from tasks.config import Settings

SUMMARISED = {"test_loss", "general_loss", "chrf"}
"""Figures of the evaluation that are shown at the end of a finetune; the report has them all."""

SAMPLES = 2
FAULTS_SHOWN = 3
PIECE_SHOWN = 600
"""Characters of a stretch of a sample."""


def print_settings(console: Console, settings: Settings, overrides: Sequence[str]) -> None:
    """Every setting with its value; those that differ from the default say where they were set."""
    from tasks.config import changed, describe, flatten

    given = {override.partition("=")[0] for override in overrides}
    different, meaning = changed(settings), describe()
    table = _table("setting", "value", "set by", "meaning")
    for key, value in flatten(settings).items():
        by = "command line" if key in given else "file" if key in different else ""
        style = "bold" if by else ""
        table.add_row(key, _plain(value), by, f"[dim]{meaning.get(key, '')}", style=style)
    console.print(table)


def print_check(console: Console, check: Check) -> None:
    """One line of the doctor: a mark, what was looked at, what was found, and what to do."""
    mark = {True: "[green]✓", False: "[red]✗", None: "[yellow]!"}[check.ok]
    console.print(f"{mark}[/] {check.name:<16} {check.value}", highlight=False, soft_wrap=True)
    if check.advice and check.ok is not True:
        console.print(f"  {'':<16} [yellow]{check.advice}", highlight=False, soft_wrap=True)


def print_outcome(console: Console, outcome: Outcome, seconds: float) -> None:
    """The summary of a finetune that took `seconds`: figures, samples, places, what to do next."""
    from tasks.evaluate.summary import evaluation_lines
    from tasks.train.step import TRAINING_FILE

    finished = outcome.finished
    training = finished.adapter.read_json(TRAINING_FILE)
    figures = finished.evaluation.figures()
    base, tuned = figures["base"], figures["tuned"]
    before, after = training["val_loss_before"], training["best_val_loss"]
    table = _table("", "before", "after", "")
    table.add_row("val loss", f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.0%}")
    ratio = tuned["perplexity"] / base["perplexity"] - 1
    table.add_row(
        "test perplexity", f"{base['perplexity']:.2f}", f"{tuned['perplexity']:.2f}", f"{ratio:+.0%}"
    )
    for line in evaluation_lines(figures, finished.evaluation.changes()):
        if line.name in SUMMARISED:
            table.add_row(line.label, line.base, line.tuned, f"{line.change} {line.verdict}")
    console.print()
    console.print(table)
    console.print(
        f"{_duration(seconds)} in all; {training['steps']} steps in {_duration(training['seconds'])}, "
        f"{training['trainable_parameters'] / 1e6:.2f}M trainable parameters, "
        f"peak memory {training['peak_memory']:.2f} GB",
        highlight=False,
    )
    if reused := finished.reused():
        console.print(f"[green]reused, because nothing they depend on has changed: {', '.join(reused)}")
    for step in finished.steps():
        if step.changed:
            console.print(Text(f"made again: {step.name} ({step.why})", style="dim"), soft_wrap=True)
    _print_samples(console, base.get("answers", []), tuned.get("answers", []))
    _print_places(console, outcome)


def print_data_report(console: Console, report: Mapping[str, Any], batch_size: int, samples: int = 0) -> None:
    """What a data report says: the account, splits, lengths, rows not used with the first lines, notes.

    Args:
        batch_size: `train.batch_size`, for the steps of an epoch.
        samples: how many to print, with what is learnt in colour, or in brackets where there is none.
    """
    console.print()
    _print_line(
        console,
        f"{report['rows_read']:,} rows read = {report['rows_used']:,} used + "
        f"{report['duplicates']:,} duplicates + {report['rejected']:,} rejected",
        "bold",
    )
    console.print(_splits(report))
    _print_facts(console, report, batch_size)
    for reason in report["reasons"].values():
        _print_reason(console, reason)
    if report["notes"]:
        console.print()
    for note in report["notes"].values():
        first = "; ".join(_told(where) for where in note["first"][:FAULTS_SHOWN])
        _print_line(console, f"noted: {note['meaning']} ({note['count']:,}: {first})", "dim")
    for sample in report["samples"][:samples]:
        _print_learnt(console, sample)
    if advice := report["guidance"]["advice"]:
        console.print()
        _print_line(console, advice, "yellow")


def print_places(console: Console, places: Mapping[str, str]) -> None:
    """Where things lie, a line each."""
    console.print()
    for what, where in places.items():
        console.print(f"{what:<12} {where}", highlight=False, soft_wrap=True, markup=False)


def print_commands(console: Console, commands: Mapping[str, str]) -> None:
    """What to type next, a line each."""
    console.print()
    for what, command in commands.items():
        console.print(f"{what:<12} [cyan]{_escaped(command)}", highlight=False, soft_wrap=True)


def _splits(report: Mapping[str, Any]) -> Table:
    table = _table("split", "rows", "tokens", "supervised", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    everything = {**report, "rows": report["rows_used"]}
    for name, size in {**report["splits"], "all": everything}.items():
        counts = (size["rows"], size["tokens"], size["supervised_tokens"])
        share = f"{size['supervised_share']:.0%}"
        table.add_row(name, *(f"{count:,}" for count in counts), share, style="bold" if name == "all" else "")
    return table


def _print_facts(console: Console, report: Mapping[str, Any], batch_size: int) -> None:
    lengths, guidance = report["length_tokens"], report["guidance"]
    rows = report["splits"]["train"]["rows"]
    cut = f"; {report['truncated']:,} cut to fit" if report["truncated"] else ""
    moved = report["rows_moved_to_fill_a_split"]
    facts = {
        "formats": ", ".join(f"{name} {count:,}" for name, count in report["formats"].items()),
        "lengths": f"median {lengths['median']:,.0f}, 95% up to {lengths['p95']:,.0f}, longest "
        f"{lengths['max']:,} tokens; the limit is {report['max_seq_length']:,}{cut}",
        "one epoch": f"{math.ceil(rows / batch_size):,} steps at train.batch_size={batch_size}",
        "template": f"{report['template']}; learnt: {report['supervise']}",
        "split by": report["split_by"] + (f"; {moved:,} moved to an empty split" if moved else ""),
        "shared": f"{report['shared_prompts']:,} held-out rows ask what a training row asks"
        if report["shared_prompts"]
        else "",
        "enough?": f"{guidance['rows']:,} training rows for data.goal={guidance['goal']}: at least "
        f"{guidance['minimum']:,}, better {guidance['recommended']:,}",
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", width=10)
    grid.add_column()
    for name, fact in facts.items():
        if fact:
            grid.add_row(name, Text(_on_one_line(fact)))
    console.print(grid)


def _print_reason(console: Console, reason: Mapping[str, Any]) -> None:
    """What is wrong with how many rows, and of the first ones where, why, and how they begin."""
    console.print()
    rows = f"{reason['rows']:,} row{'s' * (reason['rows'] != 1)}"
    _print_line(console, f"not used: {rows}, {reason['meaning']}", "bold")
    for where in reason["first"][:FAULTS_SHOWN]:
        console.print(Padding(Text(_told(where)), (0, 0, 0, 2), expand=False), highlight=False)
        if text := _on_one_line(where["text"]):
            line = Text(text, style="dim", no_wrap=True, overflow="ellipsis")
            console.print(Padding(line, (0, 0, 0, 4), expand=False), highlight=False)
    if more := reason["rows"] - len(reason["first"][:FAULTS_SHOWN]):
        console.print(Padding(Text(f"and {more:,} more", style="dim"), (0, 0, 0, 2), expand=False))


def _print_learnt(console: Console, sample: Mapping[str, Any]) -> None:
    """A sample as the model reads it, with what it learns to write made plain."""
    from tasks.prepare.page import place, printable, shortened

    plain = console.no_color or console.color_system is None
    text = Text()
    for piece, learnt in sample["pieces"]:
        shown = re.sub(r"\n{3,}", "\n\n", printable(shortened(piece, PIECE_SHOWN)))
        if learnt:
            text.append(f"⟦{shown}⟧" if plain else shown, "green")
        else:
            text.append(shown)
    text.rstrip()
    console.print()
    how = "in brackets" if plain else "in green"
    _print_line(console, f"sample, {place(sample)} ({how}: what is learnt)", "bold")
    console.print(Padding(text, (0, 0, 0, 2), expand=False), highlight=False)


def _told(where: Mapping[str, Any]) -> str:
    from tasks.prepare.page import place

    return ": ".join(filter(None, (place(where), _on_one_line(where["detail"]))))


def _print_line(console: Console, text: str, style: str) -> None:
    console.print(Text(_on_one_line(text), style=style), highlight=False)


def _on_one_line(text: str) -> str:
    from tasks.prepare.page import printable

    return " ".join(printable(text).split())


def _print_samples(console: Console, base: Sequence[dict[str, Any]], tuned: Sequence[dict[str, Any]]) -> None:
    for before, after in list(zip(base, tuned, strict=True))[:SAMPLES]:
        console.print()
        console.print(after["prompt"], style="bold", markup=False, highlight=False)
        for who, text in (
            ("reference", after["reference"]),
            ("base", before["answer"]),
            ("tuned", after["answer"]),
        ):
            grid = Table.grid(padding=(0, 1))
            grid.add_column(width=10, style="dim")
            grid.add_column()
            grid.add_row(who, _escaped(" ".join(text.split())))
            console.print(grid)


def _print_places(console: Console, outcome: Outcome) -> None:
    finished = outcome.finished
    places = {"adapter": str(finished.adapter.path), "report": str(outcome.report)}
    if finished.fused:
        places["fused model"] = str(finished.fused.path)
    if finished.registration:
        told = finished.registration
        alias = "@champion" if told.champion else "@challenger"
        places["registered"] = f"{told.name} version {told.version} {alias}: {told.reason}"
    places["MLflow run"] = f"{finished.name} ({finished.run.id})"
    print_places(console, places)
    print_commands(
        console,
        {
            "look": "tunesmith ui",
            "use": f"tunesmith chat {finished.run.id[:8]}",
        },
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _plain(value: Any) -> str:
    return "" if value is None else str(value)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for heading in headings:
        table.add_column(heading)
    return table
