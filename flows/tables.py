"""What the commands print when they are done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from flows.doctor import Check
    from flows.finetune import Outcome
    from flows.hypersearch import SearchOutcome
    from tasks.config import Settings

SAMPLES = 2


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
    if "chrf" in tuned:
        table.add_row("answers, chrF", f"{base['chrf']:.1f}", f"{tuned['chrf']:.1f}", "of 100")
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
    _print_samples(console, base.get("answers", []), tuned.get("answers", []))
    _print_places(console, outcome)


def print_search(console: Console, outcome: SearchOutcome, config: Path) -> None:
    """The leaderboard of a search, and the command that finetunes with the best settings."""
    table = _table("trial", "val loss", "learning rate", "rank", "layers", "predicted", "")
    for trial in sorted(outcome.trials, key=lambda trial: (trial.state != "trained", trial.val_loss)):
        loss = f"{trial.val_loss:.4f}" if trial.state == "trained" else "-"
        values = trial.settings
        table.add_row(
            str(trial.number),
            loss,
            f"{values.learning_rate:.2e}",
            str(values.rank),
            str(values.num_layers),
            f"{trial.predicted_bytes / 1e9:.2f} GB",
            "" if trial.state == "trained" else f"[yellow]{trial.state}",
        )
    console.print()
    console.print(table)
    console.print(
        f"budget {outcome.budget_bytes / 1e9:.2f} GB a trial; study {outcome.study}", highlight=False
    )
    if outcome.best is None:
        console.print(
            "[yellow]No trial was trained: raise --budget, or search smaller ranks and fewer layers."
        )
        return
    best = outcome.best.settings
    _print_commands(
        console,
        {
            "finetune": f"tunesmith finetune {config} train.learning_rate={best.learning_rate:.6g} "
            f"train.rank={best.rank} train.num_layers={best.num_layers}",
            "compare": "tunesmith ui",
        },
    )


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
    console.print()
    for what, where in places.items():
        console.print(f"{what:<12} {where}", highlight=False, soft_wrap=True, markup=False)
    _print_commands(
        console,
        {
            "look": "tunesmith ui",
            "use": f"mlx_lm.generate --model {finished.model.path} --adapter-path {finished.adapter.path} "
            '--prompt "…"',
        },
    )


def _print_commands(console: Console, commands: dict[str, str]) -> None:
    console.print()
    for what, command in commands.items():
        console.print(f"{what:<12} [cyan]{_escaped(command)}", highlight=False, soft_wrap=True)


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
