"""Train: one finetune, one that goes on, or a search of many."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from flows.steps import Step
from flows.verbs.frame import TRAIN, Config, Overrides, advised_screen, app, load, prefect_ready

if TYPE_CHECKING:
    from tasks.config import Settings


@app.command(name="finetune", group=TRAIN)
def finetune(
    config: Config, overrides: Overrides | None = None, /, *, force: list[Step] | None = None
) -> None:
    """Prepare, train, evaluate, fuse, register, report: one fine-tune as CONFIG says.

    Parameters
    ----------
    force
        a step to do anew, with all that follows from it, though nothing it depends on has changed
    """
    run_finetune(load(config, overrides), force=tuple(force or ()))


@app.command(group=TRAIN)
def resume(run: str, /) -> None:
    """Go on with a finetune that was stopped, killed or failed, in its own MLflow run.

    Parameters
    ----------
    run: the MLflow run: its id, the beginning of its id, or its name
    """
    from flows.prefect_environment import prepare_prefect
    from flows.resume import find_interrupted

    prepare_prefect(quiet=True)
    interrupted = find_interrupted(run)
    run_finetune(interrupted.settings, interrupted.run_id)


@app.command(group=TRAIN)
def search(
    config: Config,
    overrides: Overrides | None = None,
    /,
    *,
    trials: int | None = None,
    budget: str | None = None,
) -> None:
    """Search learning rate, rank and number of layers within a memory budget.

    Parameters
    ----------
    trials
        how many to train (search.trials)
    budget
        memory for one trial: 8GB, or 75% of what is free (search.budget)
    """
    given = [f"search.trials={trials}"] if trials is not None else []
    given += [f"search.budget={budget}"] if budget is not None else []
    settings = load(config, [*(overrides or []), *given])
    _check_budget(settings)
    with advised_screen() as shown:
        with prefect_ready(settings):
            from flows.hypersearch import hypersearch
        outcome = hypersearch(settings)
    from flows.tables import print_search

    print_search(shown.console, outcome, config)


def run_finetune(settings: Settings, resumed: str | None = None, force: tuple[str, ...] = ()) -> None:
    """Run the finetune flow, or go on with the MLflow run `resumed`, and print what came out."""
    started = time.perf_counter()
    with advised_screen() as shown:
        with prefect_ready(settings):
            from flows.finetune import finetune as flow
        outcome = flow(settings, resumed, force)
    from flows.tables import print_outcome

    print_outcome(shown.console, outcome, time.perf_counter() - started)


def _check_budget(settings: Settings) -> None:
    from search.budget import parse_budget

    parse_budget(settings.search.budget, free_bytes=1)
