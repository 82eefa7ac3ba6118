"""A study on the screen and as JSON: the leaderboard, importance, what was learnt, where to look further."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from search.findings import Findings, findings, ranked
from search.study import GIGABYTE, Study, Trial, read_study, storage_url

if TYPE_CHECKING:
    from flows.hypersearch import SearchOutcome

NAMES = {"learning_rate": "rate", "num_layers": "layers", "batch_size": "batch"}
"""Short ones, so that the leaderboard fits 80 columns."""

BAR = 24
"""Characters of the longest bar of importance."""


def print_search(console: Console, outcome: SearchOutcome) -> None:
    """What a search that has just ended has found, and what to do next."""
    from flows.tables import print_commands

    study = read_study(outcome.study)
    console.print()
    print_study(console, study)
    commands = {"look": "tunesmith ui", "dashboard": f"optuna-dashboard {storage_url()}"}
    if outcome.best_run:
        commands["use"] = f"tunesmith chat {outcome.best_run[:8]}"
    print_commands(console, commands)


def print_study(console: Console, study: Study) -> None:
    """Leaderboard, importance and sentences."""
    console.print(_leaderboard(study))
    found = findings(study)
    for name, share in found.importance.items():
        console.print(f"{name:<16} {'█' * round(share * BAR):<{BAR}} {share:4.0%}", highlight=False)
    for sentence in found.sentences:
        console.print(sentence, highlight=False, soft_wrap=True)
    budget = study.attributes.get("budget_bytes")
    told = f"budget {budget / GIGABYTE:.2f} GB; " if budget else ""
    console.print(f"[dim]study {study.name}: {told}{_standing(study)}", highlight=False, soft_wrap=True)
    if study.trials and study.best() is None and study.attributes.get("closed"):
        console.print(
            "[yellow]No trial was trained: raise --budget, or search smaller ranks and fewer layers."
        )


def study_as_json(study: Study) -> dict[str, Any]:
    """The same as plain values."""
    found: Findings = findings(study)
    return {
        "study": study.name,
        "storage": storage_url(),
        "finished": bool(study.attributes.get("finished")),
        "budget_bytes": study.attributes.get("budget_bytes"),
        "mlflow_run": study.attributes.get("mlflow.run_id"),
        "best_run": study.attributes.get("best_run"),
        "importance": dict(found.importance),
        "objectives": study.objectives,
        "front": study.front(),
        "learnt": list(found.sentences),
        "trials": [_plain(trial) for trial in ranked(study)],
    }


def _leaderboard(study: Study) -> Table:
    trials = ranked(study)
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for heading in (
        "trial",
        "val loss",
        *study.scores,
        "rung",
        *(NAMES.get(each, each) for each in names),
        "GB",
        "expected",
        "",
    ):
        table.add_column(heading)
    for trial in trials:
        standing = trial.standing
        table.add_row(
            str(trial.number),
            f"{trial.val_loss:.4f}" if standing.val_losses else "-",
            *(f"{standing.scores[name]:.2f}" if name in standing.scores else "-" for name in study.scores),
            f"{len(trial.losses)}/{len(standing.rung_steps)}",
            *(_value(trial.params, name) for name in names),
            f"{standing.measured_bytes / GIGABYTE:.2f}" if standing.measured_bytes else "-",
            f"{standing.predicted_bytes / GIGABYTE:.2f}",
            "" if trial.state == "trained" else f"[yellow]{trial.state}",
        )
    return table


def _standing(study: Study) -> str:
    if study.attributes.get("finished"):
        return "finished"
    waiting = sum(trial.state == "waiting" for trial in study.trials.values())
    left = f", {waiting} trials are not at their end" if waiting else ""
    return f"not finished{left}; when it was stopped: 'tunesmith search --resume {study.name}'"


def _plain(trial: Trial) -> dict[str, Any]:
    standing = trial.standing
    return {
        "number": trial.number,
        "state": trial.state,
        "params": dict(trial.params),
        "val_loss": trial.val_loss if standing.val_losses else None,
        "scores": dict(standing.scores),
        "val_losses": [list(each) for each in standing.val_losses],
        "rung": len(trial.losses),
        "rungs": list(standing.rung_steps),
        "seconds": standing.seconds,
        "predicted_bytes": standing.predicted_bytes,
        "measured_bytes": standing.measured_bytes or None,
        "reason": standing.reason,
        "mlflow_run": trial.run_id,
    }


def _value(params: Mapping[str, Any], name: str) -> str:
    value = params.get(name, "")
    return f"{value:.3g}" if isinstance(value, float) else str(value)
