"""Registered models on the screen: versions, who is @champion, figures, and how to use them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tasks.config import CREDENTIALS
from tasks.register.champion import ROLLED_BACK, Move
from tasks.register.versions import CHAMPION, Version

FIGURES = {
    "test_loss": ("test loss", "{:.4f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "chrf": ("chrF", "{:.1f}"),
}
"""Shown where a version has them; --json has all."""

AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def as_json(versions: Sequence[Version]) -> list[dict[str, Any]]:
    """Every version as plain values; the newest of each model first."""
    return [
        {
            "name": version.name,
            "version": version.number,
            "aliases": list(version.aliases),
            "run": version.run_id,
            "created_ms": version.created_ms,
            "figures": version.figures,
            "tags": {key: value for key, value in version.tags.items() if not key.startswith("figure.")},
        }
        for version in versions
    ]


def print_versions(console: Console, versions: Sequence[Version], uri: str) -> None:
    """A line a version, and the commands for a champion among them."""
    shown = [key for key in FIGURES if any(key in version.figures for version in versions)]
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for heading in ("model", "version", "", *(FIGURES[key][0] for key in shown), "base", "run", "age"):
        table.add_column(heading)
    for version in versions:
        figures = (_figure(version.figures, key) for key in shown)
        base = version.tags.get("base_model", "")
        cells = (version.name, str(version.number), _standing(version), *figures, base, version.run_id[:8])
        style = "bold" if CHAMPION in version.aliases else ""
        table.add_row(*cells, age(version.created_ms), style=style)
    console.print(table)
    champion = next((version for version in versions if CHAMPION in version.aliases), None)
    if champion is not None:
        _print_use(console, f"{champion.name}@{CHAMPION}", uri)


def describe(move: Move) -> str:
    """Where @champion went."""
    before = "nobody" if move.before is None else f"version {move.before}"
    return f"{move.name}: @champion goes from {before} to version {move.now}"


def age(created_ms: int) -> str:
    """How long ago, in the largest unit of which there is one: "3 d"."""
    seconds = max(0.0, time.time() - created_ms / 1000)
    return next((f"{seconds // size:.0f} {unit}" for size, unit in AGES if seconds >= size), "now")


def _standing(version: Version) -> str:
    told = " ".join(f"@{alias}" for alias in version.aliases)
    return told or ("rolled back" if ROLLED_BACK in version.tags else "")


def _figure(figures: Mapping[str, float], key: str) -> str:
    return FIGURES[key][1].format(figures[key]) if key in figures else ""


def _print_use(console: Console, name: str, uri: str) -> None:
    from flows.tables import print_commands

    store = CREDENTIALS.sub("://***@", uri)
    serve = f"MLFLOW_TRACKING_URI={store} mlflow models serve -m models:/{name} --env-manager local -p 8000"
    commands = {"talk": f"tunesmith chat {name}", "serve": f"tunesmith serve {name}", "in MLflow": serve}
    print_commands(console, commands)
