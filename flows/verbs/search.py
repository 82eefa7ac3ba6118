"""Search: many trainings within a memory budget, and what they taught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.verbs.frame import TRAIN, Overrides, advised_screen, app, load, prefect_ready

if TYPE_CHECKING:
    from tasks.config import Settings


@app.command(group=TRAIN)
def search(
    config: Annotated[
        Path | None, Parameter(help="a YAML file of settings; with --resume the name of a study")
    ] = None,
    overrides: Overrides | None = None,
    /,
    *,
    trials: int | None = None,
    time: str | None = None,
    budget: str | None = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Search learning rate, rank, layers and more within a memory budget, and finetune with the best.

    Parameters
    ----------
    trials
        how many to train (search.trials)
    time
        search for about this long instead: 8h, 90min (search.time)
    budget
        memory for the trials at work: 8GB, or 75% of what is free (search.budget)
    resume
        go on with a search that was stopped or killed: the study named, or the newest unfinished one
    """
    given = {"trials": trials, "time": time, "budget": budget}
    changes = [f"search.{name}={value}" for name, value in given.items() if value is not None]
    if resume:
        settings, study = _resumed(config, [*(overrides or []), *changes])
    else:
        settings, study = _new(config, [*(overrides or []), *changes], trials, time), None
    with advised_screen() as shown:
        with prefect_ready(settings):
            from flows.hypersearch import hypersearch
        outcome = hypersearch(settings, study)
    from flows.study_tables import print_search

    print_search(shown.console, outcome)


@app.command(group=TRAIN)
def study(name: str | None = None, /, *, as_json: Annotated[bool, Parameter("--json")] = False) -> None:
    """Show what a search has found, while it runs or afterwards: leaderboard, importance, what was learnt.

    Parameters
    ----------
    name
        the study; the newest one by default
    as_json
        all of it as JSON on standard output
    """
    from rich.console import Console

    from flows.study_tables import print_study, study_as_json
    from search.study import read_study, study_names
    from tasks.errors import InputError

    names = [name] if name else study_names()
    if not names:
        raise InputError("there is no study yet; 'tunesmith search CONFIG' makes one")
    found = read_study(names[0])
    if as_json:
        print(json.dumps(study_as_json(found), indent=2))
    else:
        print_study(Console(), found)


def _new(config: Path | None, overrides: list[str], trials: int | None, time: str | None) -> Settings:
    from search.budget import parse_budget
    from tasks.errors import InputError

    if config is None:
        raise InputError("give a YAML file of settings, such as flows/configs/search.yaml, or --resume")
    if trials is not None and time is not None:
        raise InputError(f"--trials {trials} and --time {time}: give one of them; the other follows from it")
    settings = load(config, overrides)
    parse_budget(settings.search.budget, free_bytes=1)
    return settings


def _resumed(name: Path | None, changes: list[str]) -> tuple[Settings, str]:
    from flows.prefect_environment import prepare_prefect
    from search.study import unfinished_study
    from tasks.errors import InputError

    if changes:
        raise InputError(
            f"--resume with {' '.join(changes)}: a search goes on with the settings it began with; "
            "leave these out"
        )
    prepare_prefect(quiet=True)
    from flows.hypersearch import resumable_settings

    chosen = str(name) if name else unfinished_study()
    return resumable_settings(chosen), chosen
