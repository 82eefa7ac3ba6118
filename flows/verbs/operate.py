"""Operate: servers, schedules, and what a power cut has left."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from flows.verbs.frame import (
    OPERATE,
    Config,
    Overrides,
    advised_screen,
    app,
    check,
    load,
    prefect_ready,
)

Timezone = Annotated[
    str | None, Parameter(help="of the cron expression, as Europe/Berlin; this machine's by default")
]
Name = Annotated[str | None, Parameter(help="of the deployment; the settings file's by default")]


@app.command(group=OPERATE)
def schedule(
    config: Config,
    overrides: Overrides | None = None,
    /,
    *,
    cron: str,
    timezone: Timezone = None,
    name: Name = None,
    install_hint: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Retrain when the rows have changed, again and again, served by Prefect until it is stopped.

    Parameters
    ----------
    cron
        when, for example "0 2 * * *" for two o'clock every night
    install_hint
        only print what keeps this schedule alive over reboots: a launchd agent and a systemd unit
    """
    from flows.deploy import next_fire_times
    from flows.deploy import schedule as serve
    from flows.prefect_environment import prepare_prefect

    settings = load(config, overrides)
    prepare_prefect(quiet=False)
    if install_hint:
        from flows import install_hint as hint

        next_fire_times(cron, timezone or "UTC")
        print(
            hint.install_hint(
                hint.schedule_command(config, overrides or [], cron, timezone, name), name or config.stem
            )
        )
        return
    with advised_screen():
        check(settings)
        serve(settings, name or config.stem, cron, timezone)


@app.command(group=OPERATE)
def deploy(
    config: Config,
    overrides: Overrides | None = None,
    /,
    *,
    pool: str = "tunesmith",
    cron: str | None = None,
    timezone: Timezone = None,
    name: Name = None,
) -> None:
    """Give the retrain flow to the workers of a Prefect work pool, by a schedule or on demand.

    Parameters
    ----------
    pool
        of type process; made if it is not there
    cron
        when, for example "0 2 * * *" for two o'clock every night; without it, when somebody says so
    """
    from flows.prefect_environment import prepare_prefect
    from flows.tables import print_commands
    from flows.work_pool import deploy as make

    settings = load(config, overrides)
    prepare_prefect(quiet=True)
    with advised_screen() as shown:
        check(settings)
        made = make(settings, name or config.stem, pool, cron, timezone)
    shown.line(f"{made.name} is deployed in work pool '{made.pool}'{' (new)' if made.made_pool else ''}")
    address = f"PREFECT_API_URL={made.api_url}"
    commands = {
        "run it here": f"{address} prefect worker start --pool {made.pool}",
        "start it now": f"{address} prefect deployment run {made.name}",
    }
    print_commands(shown.console, commands)


@app.command(group=OPERATE)
def retrain(config: Config, overrides: Overrides | None = None, /) -> None:
    """Fine-tune if the rows have changed since the last time, and promote what is better."""
    settings = load(config, overrides)
    with advised_screen() as shown:
        with prefect_ready(settings):
            from flows.retrain import retrain as flow
        done = flow(settings)
    shown.line(done.reason)


@app.command(group=OPERATE)
def clean(config: Config | None = None, /) -> None:
    """Close what a power cut or a kill has left running in MLflow, Prefect and Optuna; living runs stay."""
    from flows.prefect_environment import prepare_prefect, wake_server

    settings = load(config, [])
    prepare_prefect(quiet=True)
    with advised_screen(quiet=True) as shown:
        from flows.clean import clean as close
        from tasks.progress import progress

        with progress("starting Prefect"):
            wake_server()
        lines = close(settings.tracking).lines()
    for line in lines or ["nothing was left running"]:
        shown.line(line)


@app.command(group=OPERATE)
def up(*, port: int = 4200) -> None:
    """Keep a local Prefect server running: flows then start sooner, and its UI shows every run."""
    from flows.server import up as start

    with advised_screen() as shown:
        state = start(port)
    shown.line(f"Prefect is up: {state.url}   ('tunesmith down' ends it)")


@app.command(group=OPERATE)
def down() -> None:
    """End the local Prefect server."""
    from flows.server import down as stop

    with advised_screen() as shown:
        shown.line("Prefect is down" if stop() else "no local Prefect server was running")
