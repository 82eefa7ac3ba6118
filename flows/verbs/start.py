"""Start: try it, look at settings and machine."""

from __future__ import annotations

import sys

from rich.console import Console

from flows.verbs.frame import QUICKSTART, START, Config, Overrides, advised_screen, app, explain, load
from flows.verbs.train import run_finetune


@app.command(group=START)
def quickstart(overrides: Overrides | None = None, /) -> None:
    """Fine-tune the bundled 135M model on the standard library's docstrings: the whole road in minutes."""
    run_finetune(load(QUICKSTART, overrides))


@app.command(group=START)
def doctor(config: Config | None = None, /) -> None:
    """Check that everything works here: Python, MLX, memory, disk, MLflow, Prefect, data, a trial step."""
    from flows.doctor import diagnose
    from flows.prefect_environment import prepare_prefect
    from flows.tables import print_check

    settings = load(config or QUICKSTART, [])
    prepare_prefect(quiet=True)
    with advised_screen(quiet=True) as shown:
        checks = []
        for check in diagnose(settings):
            print_check(shown.console, check)
            checks.append(check)
    failed = sum(check.ok is False for check in checks)
    if failed:
        sys.exit(explain(f"{failed} of {len(checks)} checks failed", 1))


@app.command(group=START)
def show(config: Config | None = None, overrides: Overrides | None = None, /) -> None:
    """Print the resolved settings; those that are not the defaults are marked with where they come from."""
    from flows.tables import print_settings

    print_settings(Console(), load(config, overrides), overrides or [])
