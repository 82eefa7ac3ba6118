"""What `tunesmith report` does: the pages of runs, and of several one that compares them.

A finished finetune has left the facts of its report in MLflow; of any other run, as one that was killed,
the page says what its figures and settings tell.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.compare import compare_runs
from flows.find_run import newest_run
from tasks.config import TrackingSettings
from tasks.evaluate.summary import MEANINGS
from tasks.home import runs_dir
from tasks.report.facts import Facts
from tasks.report.page import comparison_html, comparison_markdown
from tasks.report.progression import progression
from tasks.report.write import FACTS_FILE, write_pages
from tasks.run_records import RunRecord, curves, run_record
from tasks.tracking import read_folder

CURVES = ("train_loss", "val_loss", "learning_rate", "epoch", "tokens_per_second")


def report_runs(references: Sequence[str], out: Path | None = None) -> list[Path]:
    """Write the pages of runs; of several, first one that compares them.

    Args:
        references: ids, beginnings of ids, or names (the newest run of a name).
        out: the folder; `mlruns/reports` by default.

    Raises:
        InputError: one of the runs is not there, or several are meant.
    """
    tracking = TrackingSettings()
    found = [newest_run(reference, tracking) for reference in dict.fromkeys(references)]
    runs = list({run.id: run for run in found}.values())
    all_facts = [facts_of_run(tracking, run.id) for run in runs]
    pages = [page for facts in all_facts for page in write_pages(facts, out)]
    if len(runs) < 2:
        return pages
    comparison = compare_runs([run.id for run in runs]).as_json()
    name = "-".join(["comparison", *(run.id[:8] for run in runs)])
    html = (out or runs_dir() / "reports") / f"{name[:100]}.html"
    html.write_text(comparison_html(comparison, all_facts), encoding="utf-8")
    markdown = html.with_suffix(".md")
    markdown.write_text(comparison_markdown(comparison, all_facts), encoding="utf-8")
    return [html, markdown, *pages]


def facts_of_run(tracking: TrackingSettings, run_id: str) -> Facts:
    """The facts a run has left, or what its record tells."""
    folder = read_folder(tracking, run_id, "report")
    kept = folder / FACTS_FILE if folder else None
    if kept is not None and kept.is_file():
        facts: Facts = json.loads(kept.read_text(encoding="utf-8"))
        return facts
    return facts_of_record(run_record(tracking, run_id), curves(tracking, run_id, CURVES))


def facts_of_record(record: RunRecord, curves: dict[str, list[tuple[int, float]]]) -> Facts:
    """What figures, settings and curves alone tell."""
    figures = record.figures
    facts: Facts = {
        "run": {
            "name": record.name,
            "id": record.id,
            "state": record.state,
            "written": time.strftime("%Y-%m-%d %H:%M"),
            "model": record.params.get("model.source", ""),
            "source": Path(record.params.get("data.source", "")).name,
        },
        "settings": dict(sorted(record.params.items())),
        "changed": [],
        "history": {name: curves[name] for name in ("train_loss", "val_loss")},
        "progression": progression(_history(curves)),
        "headline": _headline(figures),
        "suggestions": _suggestions(record),
    }
    if lines := _evaluation(figures):
        facts["evaluation"] = {"lines": lines}
    return facts


def _history(curves: dict[str, list[tuple[int, float]]]) -> list[tuple[int, dict[str, float]]]:
    by_step: dict[int, dict[str, float]] = {}
    for name, curve in curves.items():
        for step, value in curve:
            by_step.setdefault(step, {})[name] = value
    return sorted(by_step.items())


def _headline(figures: Any) -> list[dict[str, str]]:
    shown = {
        "best_val_loss": "best validation loss",
        "test_loss": "test loss",
        "peak_memory": "peak memory (GB)",
    }
    return [
        {"value": f"{figures[name]:.3f}", "label": label} for name, label in shown.items() if name in figures
    ]


def _evaluation(figures: Any) -> list[dict[str, Any]]:
    """Base and tuned beside each other, and what changed as far as it was logged."""
    lines = []
    for name, label in MEANINGS.items():
        if (base := figures.get(f"base/{name}")) is None or (tuned := figures.get(f"test/{name}")) is None:
            continue
        change = figures.get(f"change/{name}")
        low, high = figures.get(f"change/{name}_low"), figures.get(f"change/{name}_high")
        told = "" if change is None else f"{change:+.4g}"
        told += f" ({low:+.4g} to {high:+.4g})" if low is not None and high is not None else ""
        lines.append(
            {"name": name, "label": label, "base": f"{base:.4g}", "tuned": f"{tuned:.4g}", "change": told,
             "better": None, "verdict": ""}
        )  # fmt: skip
    return lines


def _suggestions(record: RunRecord) -> list[str]:
    if record.state in ("FINISHED", "RUNNING"):
        return []
    why = f" ({told})" if (told := record.tags.get("tunesmith.error")) else ""
    return [
        f"The run did not end well{why}: 'tunesmith resume {record.id[:8]}' goes on from its last checkpoint."
    ]
