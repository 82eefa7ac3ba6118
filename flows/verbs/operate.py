"""Operate: servers and schedules."""

from __future__ import annotations

from flows.verbs.frame import OPERATE, Config, Overrides, advised_screen, app, check, load


@app.command(group=OPERATE)
def schedule(
    config: Config,
    overrides: Overrides | None = None,
    /,
    *,
    cron: str,
    timezone: str | None = None,
) -> None:
    """Fine-tune again and again, served by Prefect until it is stopped.

    Parameters
    ----------
    cron
        when, for example "0 2 * * *" for two o'clock every night
    timezone
        of the cron expression, for example Europe/Berlin; this machine's by default
    """
    from flows.deploy import schedule as serve
    from flows.prefect_environment import prepare_prefect

    settings = load(config, overrides)
    with advised_screen():
        prepare_prefect(quiet=False)
        check(settings)
        serve(settings, config.stem, cron, timezone)


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
