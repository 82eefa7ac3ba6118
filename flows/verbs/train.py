"""Train: one finetune, or one that goes on."""

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


def run_finetune(settings: Settings, resumed: str | None = None, force: tuple[str, ...] = ()) -> None:
    """Run the finetune flow, or go on with the MLflow run `resumed`, and print what came out."""
    started = time.perf_counter()
    with advised_screen() as shown:
        with prefect_ready(settings):
            from flows.finetune import finetune as flow
        outcome = flow(settings, resumed, force)
    from flows.tables import print_outcome

    print_outcome(shown.console, outcome, time.perf_counter() - started)
