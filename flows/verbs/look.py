"""Look: what was found out."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from flows.verbs.frame import (
    LOOK,
    Config,
    advised_screen,
    app,
    load,
    quiet_prefect,
    quiet_screen,
)

AsJson = Annotated[bool, Parameter(name="--json", negative=(), help="print JSON, and nothing else")]


@app.command(group=LOOK)
def runs(
    *, last: int = 20, trials: Annotated[bool, Parameter(negative=())] = False, as_json: AsJson = False
) -> None:
    """List runs, the newest first: state, best figures, memory, time.

    Parameters
    ----------
    last
        so many of them
    trials
        those of searches too
    """
    quiet_prefect()
    from flows.run_tables import print_runs
    from tasks.config import TrackingSettings
    from tasks.errors import InputError
    from tasks.run_records import run_records

    if last < 1:
        raise InputError(f"--last {last}: give 1 or more")
    with quiet_screen():
        records = run_records(TrackingSettings(), last, trials)
    if as_json:
        print(json.dumps([record.as_json() for record in records], indent=2))
    elif records:
        print_runs(Console(), records)
    else:
        print("No runs yet: 'tunesmith quickstart' makes the first.")


@app.command(group=LOOK)
def watch(run: str, /, *, once: Annotated[bool, Parameter(negative=())] = False) -> None:
    """Show the curves of a run in the terminal while it goes on; Ctrl-C ends the looking, not the run.

    Parameters
    ----------
    run
        an MLflow run: its id, the beginning of it, or its name
    once
        as it is now, and end
    """
    quiet_prefect()
    from flows.find_run import newest_run
    from flows.watch import watch as follow
    from tasks.config import TrackingSettings

    with quiet_screen():
        found = newest_run(run, TrackingSettings())
    with suppress(KeyboardInterrupt):
        follow(Console(), TrackingSettings(), found.id, once)


@app.command(group=LOOK)
def compare(runs: list[str], /, *, as_json: AsJson = False) -> None:
    """Put runs side by side: the settings in which they differ, and the figures that moved.

    Parameters
    ----------
    runs
        two or more MLflow runs: ids, beginnings of ids, or names
    """
    quiet_prefect()
    from flows.compare import compare_runs
    from flows.comparison_tables import print_comparison

    with quiet_screen():
        comparison = compare_runs(runs)
    if as_json:
        print(json.dumps(comparison.as_json(), indent=2))
    else:
        print_comparison(Console(), comparison)


@app.command(group=LOOK)
def evaluate(
    models: list[str],
    /,
    *,
    data: str | None = None,
    all_rows: Annotated[bool, Parameter(negative=())] = False,
    as_json: AsJson = False,
) -> None:
    """Measure models on the same rows, each beside its base: losses, answers, scores, intervals.

    Parameters
    ----------
    models
        runs (id or name), NAME@champion, adapter folders, or what model.source takes; and settings, as
        evaluate.samples=64: others are those of the first run, or the defaults
    data
        what data.source takes; by default the data of the runs, which have to be the same
    all_rows
        measure all rows of the data, not the test rows only: for rows that nothing was trained on
    """
    quiet_prefect()
    from flows.comparison_tables import print_measured
    from flows.evaluate import evaluate_targets

    with quiet_screen():
        measured = evaluate_targets(models, data, all_rows)
    if as_json:
        print(json.dumps([one.as_json() for one in measured], indent=2))
    else:
        print_measured(Console(), measured)


@app.command(group=LOOK)
def report(runs: list[str], /, *, out: Path | None = None) -> None:
    """Write the report of runs, as HTML and as Markdown; of several, a page that compares them too.

    Parameters
    ----------
    runs
        MLflow runs: ids, beginnings of ids, or names
    out
        the folder to write to; mlruns/reports by default
    """
    quiet_prefect()
    from flows.report import report_runs

    with quiet_screen():
        pages = report_runs(runs, out)
    for page in pages:
        print(page)


@app.command(group=LOOK)
def ui(
    config: Config | None = None, /, *, port: int = 5000, prefect: Annotated[bool, Parameter()] = True
) -> None:
    """Serve the pages of MLflow, Prefect and (where it is installed) Optuna's dashboard on this machine.

    Parameters
    ----------
    port
        of MLflow's pages
    prefect
        start Prefect's server too, where it is not up
    """
    from flows.ui import open_ui
    from tasks.tracking import connect, send_leftovers, tracking_uri

    tracking = load(config, []).tracking
    uri, experiment_id = tracking_uri(tracking), None
    with advised_screen():
        if uri.startswith(("http://", "https://")):  # it has its own pages, and need not be up to be named
            send_leftovers(uri)
        else:
            _, uri, experiment_id = connect(tracking)
        open_ui(port, uri, prefect=prefect, experiment_id=experiment_id)
