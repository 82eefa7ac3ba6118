"""`tunesmith schedule CONFIG --cron "0 2 * * *"`: the retrain flow, again and again while this runs.

The flow is served by Prefect: the local server keeps the schedule, this process starts the runs.

Time zone   the machine's own unless another is named; its summer time is followed.
Overlap     never: a run that is due while another is going waits for its end (`limit=1`).
Catch-up    once: Prefect plans a few runs ahead, and those that came due while this process was killed
            or the machine was off are started late, one after another. The first does the work, the
            others find nothing changed and end. After Ctrl-C or SIGTERM, which pause the schedule,
            nothing is caught up on.
"""

from __future__ import annotations

import asyncio
import os
import signal
import zoneinfo
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.server import up
from tasks.config import Settings
from tasks.errors import InputError

if TYPE_CHECKING:
    from prefect import Flow

CRON_EXAMPLE = "'0 2 * * *' (minute hour day month weekday: every night at two)"


def schedule(settings: Settings, name: str, cron: str, timezone: str | None = None) -> None:
    """Serve the retrain flow on a cron schedule until Ctrl-C or SIGTERM.

    Args:
        settings: of every run.
        name: of the deployment.
        cron: five fields, minute hour day month weekday.
        timezone: an IANA name such as Europe/Berlin; the machine's own by default.

    Raises:
        InputError: the expression or the time zone is wrong; nothing was started.
        StepError: the local server did not come up.
        SystemExit: always in the end, with 130 after Ctrl-C and 143 after SIGTERM.
    """
    zone = timezone or local_timezone()
    next_fire_times(cron, zone)
    api_url = lasting_api()
    from flows.retrain import check_registry, retrain

    check_registry(settings)
    parameters = {"settings": settings.model_dump(mode="json", by_alias=True)}
    serve(retrain, name, cron, zone, parameters, api_url)


def serve(
    flow: Flow[..., Any], name: str, cron: str, timezone: str, parameters: Mapping[str, Any], api_url: str
) -> None:
    """Serve any flow until Ctrl-C (of a terminal, where it reaches the run too) or SIGTERM.

    The server of `api_url` keeps the schedule meanwhile, and pauses it at the end. A run in progress
    is ended by the same signal.

    Raises:
        SystemExit: always in the end, with 130 after Ctrl-C and 143 after SIGTERM.
    """
    from prefect.runner import Runner
    from prefect.schedules import Cron
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.types.entrypoint import EntrypointType

    code = 130

    class OneAtATime(Runner):
        def handle_sigterm(self, *_: Any, **__: Any) -> None:
            # Prefect's own (3.8.8) waits for the run in progress, however long, and exits with 0.
            nonlocal code
            code = 143
            _end_runs()
            signal.raise_signal(signal.SIGINT)

    with temporary_settings({PREFECT_API_URL: api_url}):
        runner = OneAtATime(name=name, limit=1, pause_on_shutdown=True)
        runner.add_flow(
            flow,
            name=name,
            schedule=Cron(cron, timezone=timezone),
            parameters=dict(parameters),
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        _announce(name, cron, timezone, api_url)
        with suppress(KeyboardInterrupt):
            asyncio.run(runner.start())
    raise SystemExit(code)


def next_fire_times(cron: str, timezone: str, count: int = 3) -> list[datetime]:
    """The next times at which Prefect's own scheduler will start a run.

    Raises:
        InputError: no such time zone, not a cron expression, or one that never comes true.
    """
    if timezone not in zoneinfo.available_timezones():
        raise InputError(f"time zone '{timezone}': not known; give an IANA name such as Europe/Berlin")
    from prefect.server.schemas.schedules import CronSchedule

    try:
        planned = CronSchedule(cron=cron, timezone=timezone)
    except ValueError:
        raise InputError(f"cron '{cron}': not a cron expression; write one such as {CRON_EXAMPLE}") from None
    try:
        return list(asyncio.run(planned.get_dates(count)))
    except ValueError:
        raise InputError(f"cron '{cron}': never comes true; write one such as {CRON_EXAMPLE}") from None


def lasting_api() -> str:
    """The API of a server that outlives this command; the local one is started when there is none.

    Raises:
        StepError: the local server did not come up.
    """
    from prefect.settings import get_current_settings

    if chosen := get_current_settings().api.url:
        return chosen
    print("A schedule needs a Prefect server that stays; starting the local one.")
    return up().api_url


def local_timezone() -> str:
    """The IANA name of the machine's time zone; UTC when it has none."""
    if (named := os.environ.get("TZ", "").removeprefix(":")) in zoneinfo.available_timezones():
        return named
    _, marker, name = str(Path("/etc/localtime").resolve()).partition("zoneinfo/")
    return name if marker and name in zoneinfo.available_timezones() else "UTC"


def _end_runs() -> None:
    import psutil

    for run in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            run.terminate()


def _announce(name: str, cron: str, timezone: str, api_url: str) -> None:
    times = next_fire_times(cron, timezone)
    print(f"'{name}' is scheduled: {cron} ({timezone}). The next runs start at")
    for time in times:
        print(f"  {time.astimezone(zoneinfo.ZoneInfo(timezone)):%a %d %B %Y %H:%M:%S %Z}")
    print("Runs never overlap: one that is due while another is going waits for its end.")
    print("Runs missed while the machine is off are made up for by one, and a run without news ends at once.")
    print(f"Watch them at {api_url.removesuffix('/api')}")
    print(
        "Keep this running; Ctrl-C ends the schedule, 'tunesmith down' ends the Prefect server.", flush=True
    )
