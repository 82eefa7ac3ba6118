"""`tunesmith watch RUN`: the curves of a run in the terminal as it goes on; Ctrl-C ends the looking only."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from flows.curves import draw_curves
from tasks.config import TrackingSettings
from tasks.run_records import Curve, RunRecord, curves, run_record

SHOWN = ("train_loss", "val_loss")
BESIDE = {
    "learning_rate": ("learning rate", "{:.2e}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "peak_memory": ("peak memory", "{:.2f} GB"),
    "epoch": ("epoch", "{:.2f}"),
    "best_val_loss": ("best val loss", "{:.4f}"),
    "test_loss": ("test loss", "{:.4f}"),
}
"""Figures told by their last value."""

LOOK_EVERY_S = 2.0
HEIGHT = 18


@dataclass(frozen=True)
class Look:
    """A run at one moment."""

    record: RunRecord
    curves: Mapping[str, Curve]


def look_at(tracking: TrackingSettings, run_id: str) -> Look:
    """The run as it is now."""
    return Look(run_record(tracking, run_id), curves(tracking, run_id, SHOWN))


def watch(console: Console, tracking: TrackingSettings, run_id: str, once: bool = False) -> RunRecord:
    """Show the run until it ends; where there is no terminal, or with `once`, as it is now.

    While the store does not answer, the last look stays on the screen, and says so.
    """
    look = look_at(tracking, run_id)
    if once or not console.is_terminal:
        console.print(shown(look, console.width))
        return look.record
    with Live(shown(look, console.width), console=console, refresh_per_second=2) as live:
        while look.record.state == "RUNNING":
            time.sleep(LOOK_EVERY_S)
            try:
                look = look_at(tracking, run_id)
                live.update(shown(look, console.width))
            except Exception as error:  # whatever the client raises: the run goes on
                live.update(Group(shown(look, console.width), Text(f"MLflow: {error}"[:200], "yellow")))
    return look.record


def shown(look: Look, width: int) -> Group:
    """The head, the curves, and the last figures."""
    record = look.record
    head = Text.assemble(
        (record.name, "bold"), f" ({record.id[:8]})  ", (record.state.lower(), _style(record.state)),
        f"  {_age(record)}",
    )  # fmt: skip
    if steps := look.curves["train_loss"]:
        head.append(f"  step {steps[-1][0]:,}")
    return Group(head, draw_curves(look.curves, min(width, 110), HEIGHT), _figures(record))


def _figures(record: RunRecord) -> Text:
    known = [
        f"{label} {form.format(record.figures[name])}"
        for name, (label, form) in BESIDE.items()
        if name in record.figures
    ]
    return Text("   ".join(known), style="dim")


def _age(record: RunRecord) -> str:
    ended_ms = record.ended_ms or int(1000 * time.time())
    minutes, seconds = divmod(max(0, ended_ms - record.started_ms) // 1000, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _style(state: str) -> str:
    return {"RUNNING": "cyan", "FINISHED": "green"}.get(state, "red")
