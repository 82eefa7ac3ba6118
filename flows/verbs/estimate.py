"""Estimate: what a run will take, before it is started."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console

from flows.verbs.frame import START, Config, Overrides, app, load, quiet_screen


@app.command(group=START)
def estimate(
    config: Config | None = None,
    overrides: Overrides | None = None,
    /,
    *,
    budget: str | None = None,
    length: Annotated[int | None, Parameter(validator=Number(gte=2))] = None,
    table: bool = False,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Predict a run's peak memory by its parts, and what fits a budget, without loading any weights.

    Parameters
    ----------
    budget
        show what fits: 8GB, or 75% of what is free (train.budget)
    length
        tokens of a row, half of them supervised, in place of the prepared rows (512 where there are none)
    table
        LoRA, QLoRA and full training of models of 1B to 70B on this machine, in place of a run
    as_json
        print one JSON object
    """
    from flows.estimating import LENGTH, estimate_run, estimate_table
    from flows.estimating_tables import print_estimate, print_table

    console = Console()
    if table:
        with quiet_screen():
            found = estimate_table(length or LENGTH)
        print(json.dumps(found)) if as_json else print_table(console, found, length or LENGTH)
        return
    if budget is not None:
        overrides = [*(overrides or []), f"train.budget={budget}"]
    settings = load(config, overrides)
    with quiet_screen():
        told = estimate_run(settings, length, with_fits=budget is not None)
    print(json.dumps(told.plain())) if as_json else print_estimate(console, told)
