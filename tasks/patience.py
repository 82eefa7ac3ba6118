"""Which failures are worth another try, how long is waited before it, and how long a step may take.

A server or a network that did not answer may answer in a minute. Bad data, a loss that is not finite, a
run over its memory budget, a full disk and a fault in the program are there the next time too. A training
that is tried again goes on from its newest checkpoint.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from typing import Any

from tasks.config import FlowSettings
from tasks.errors import InputError, OutageError, StepError

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 300.0

UNREACHABLE = {
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.ENETUNREACH,
    errno.ENETDOWN, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.EAGAIN, errno.EBUSY, errno.ESTALE,
}  # fmt: skip
"""What the system says of a network, or of a file on one."""

OUTAGES = {
    # Of libraries that are imported where they are needed only.
    "httpx": ("TransportError",),
    "requests": ("ConnectionError", "Timeout", "ChunkedEncodingError"),
    "sqlalchemy": ("OperationalError",),
    "urllib3": ("HTTPError",),
    "huggingface_hub": ("LocalEntryNotFoundError", "OfflineModeIsEnabled"),
}
"""By package, the classes of errors (or of their ancestors) that are outages."""

MLFLOW_OUTAGES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")
"""MLflow's codes of what may pass; of an unreachable server its client says INTERNAL_ERROR."""

BUSY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
"""Of HTTP: ask again later."""


def patience(settings: FlowSettings) -> dict[str, Any]:
    """Options of a Prefect task: tries again with a doubling pause, for what may heal, and a time limit."""
    pauses = [min(settings.retry_pause_s * 2**number, LONGEST_PAUSE_S) for number in range(settings.retries)]
    limit = settings.step_minutes
    return {
        "retries": settings.retries,
        "retry_delay_seconds": pauses or None,
        "retry_condition_fn": may_pass,
        "timeout_seconds": None if limit is None else 60 * limit,
    }


def may_pass(task: Any, run: Any, state: Any) -> bool:
    """`may_heal` of a failed task run, as Prefect asks for it; says what it decides."""
    error = state.data
    healing = isinstance(error, BaseException) and may_heal(error)
    if healing:
        log.warning("%s: %s: %s; trying again", task.name, type(error).__name__, error)
    return healing


def may_heal(error: BaseException) -> bool:
    """Whether the same step may succeed later, with nothing changed by a person."""
    for each in _causes(error):
        if isinstance(each, OutageError):
            return True
        if isinstance(each, InputError | StepError):
            return False
        if _is_outage(each):
            return True
    return False


def _is_outage(error: BaseException) -> bool:
    if type(error).__module__.startswith("prefect."):
        return False  # a step that ran into its time limit would do so again
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in UNREACHABLE:
        return True
    if type(error).__name__ == "MlflowException" or "MlflowException" in _ancestors(error):
        return getattr(error, "error_code", None) in MLFLOW_OUTAGES
    if (response := getattr(error, "response", None)) is not None:
        return getattr(response, "status_code", None) in BUSY_STATUSES
    if isinstance(error, RuntimeError) and "timed out" in str(error).lower().replace("timeout", "timed out"):
        return True  # a GPU whose screen or another program kept it busy
    return any(
        cls.__module__.partition(".")[0] == package and cls.__name__ in names
        for cls in type(error).__mro__
        for package, names in OUTAGES.items()
    )


def _ancestors(error: BaseException) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, the outermost first."""
    each: BaseException | None = error
    seen: set[int] = set()
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
