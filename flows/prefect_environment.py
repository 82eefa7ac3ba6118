"""How Prefect behaves in a command a person watches: quiet on the screen, complete in its own log.

Prefect reads its settings when it is imported, so `prepare_prefect` comes before that.
"""

from __future__ import annotations

import logging
import os

from flows.server import use_running_server
from tasks.process import set_up_process

OURS = ("tasks", "flows", "search")


def prepare_prefect(quiet: bool) -> bool:
    """Set this process up for Prefect, before Prefect is imported. A person's own environment wins.

    The log lines of our packages reach the Prefect API, and the local server is used when it is up.

    Args:
        quiet: print nothing of Prefect's: no log lines, no tracebacks. All of it still reaches the
            Prefect API, and exceptions reach the caller as they are. Processes started from this one
            are quiet too.

    Returns:
        Whether this process will talk to the local server.
    """
    set_up_process()
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", ",".join(OURS))
    # Our packages also log outside of flow runs, where Prefect would warn at each line.
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    if quiet:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    log_our_steps()
    return use_running_server()


def log_our_steps() -> None:
    """Let INFO lines of our packages through; a process that Prefect itself starts needs it too."""
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)


def wake_server() -> str:
    """Import Prefect and see that a server answers; seconds without the local one, so show the wait.

    Without a server, Prefect's own temporary one is started; it ends with this process.

    Returns:
        The address of the API.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.hello().raise_for_status()
        return str(client.api_url)
