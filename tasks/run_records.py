"""Runs of the store with all that is known of them: `tunesmith runs` lists them, `watch` follows one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.alive import is_gone
from tasks.config import TrackingSettings
from tasks.home import runs_dir
from tasks.outbox import Point, kept_points
from tasks.tracking import PROCESS, connect

PARENT = "mlflow.parentRunId"

Curve = list[tuple[int, float]]
"""Step and value, by step."""


@dataclass(frozen=True)
class RunRecord:
    """A run and its figures.

    Attributes:
        state: RUNNING, FINISHED, FAILED or KILLED; "DEAD" where it says RUNNING and its process is gone.
        started_ms, ended_ms: since 1970; `ended_ms` is None while it runs.
        parent: the search it is a trial of.
        figures: the last value of each.
    """

    id: str
    name: str
    state: str
    started_ms: int
    ended_ms: int | None
    parent: str | None
    figures: Mapping[str, float]
    params: Mapping[str, str]
    tags: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        told = ("id", "name", "state", "started_ms", "ended_ms", "parent")
        return {name: getattr(self, name) for name in told} | {"figures": dict(self.figures)}


def run_records(settings: TrackingSettings, count: int, trials: bool = False) -> list[RunRecord]:
    """The newest runs of all experiments.

    Args:
        count: of them, at most.
        trials: those of searches too.
    """
    client, _, _ = connect(settings)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found: list[RunRecord] = []
    token: str | None = None
    while True:
        page = client.search_runs(experiments, page_token=token, max_results=200)
        found += [record for run in page if (record := _record(run)).parent is None or trials]
        token = page.token
        if len(found) >= count or not token:
            return found[:count]


def run_record(settings: TrackingSettings, run_id: str) -> RunRecord:
    """One run."""
    client, _, _ = connect(settings)
    return _record(client.get_run(run_id))


def curves(settings: TrackingSettings, run_id: str, names: tuple[str, ...]) -> dict[str, Curve]:
    """Figures over steps: what the store has, and what still waits on this machine to be sent to it."""
    client, _, _ = connect(settings)
    points: dict[str, dict[int, float]] = {name: {} for name in names}
    for name in names:
        for point in client.get_metric_history(run_id, name):
            points[name][point.step] = point.value
    return merged(points, kept_points(runs_dir() / "outbox", run_id))


def merged(points: Mapping[str, Mapping[int, float]], kept: list[Point]) -> dict[str, Curve]:
    """Points of the store with those that are kept here laid over them."""
    found = {name: dict(known) for name, known in points.items()}
    for point in kept:
        if point.name in found:
            found[point.name][point.step] = point.value
    return {name: sorted(known.items()) for name, known in found.items()}


def _record(run: Any) -> RunRecord:
    info, tags = run.info, dict(run.data.tags)
    dead = info.status == "RUNNING" and is_gone(tags.get(PROCESS, ""))
    return RunRecord(
        info.run_id,
        info.run_name or "",
        "DEAD" if dead else info.status,
        int(info.start_time),
        int(info.end_time) if info.end_time else None,
        tags.get(PARENT),
        dict(run.data.metrics),
        dict(run.data.params),
        tags,
    )
