"""`tunesmith deploy CONFIG --pool POOL`: the retrain flow for Prefect's workers, on this machine or others.

A deployment outlives this command: the server keeps it, and any worker of the pool runs it. The flow is
named by its module, so a worker needs Tunesmith installed, and the same store by MLFLOW_TRACKING_URI.
`prefect.yaml` says the same for `prefect deploy`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flows.deploy import lasting_api, local_timezone, next_fire_times
from flows.prefect_environment import OURS
from tasks.config import Settings
from tasks.errors import InputError

POOL_TYPE = "process"
"""Of a pool that is made here: runs are processes on the worker's machine."""


@dataclass(frozen=True)
class Deployed:
    """A deployment on the server.

    Attributes:
        name: as `prefect deployment run` takes it.
        made_pool: the pool was not there before.
    """

    name: str
    pool: str
    api_url: str
    made_pool: bool


def deploy(
    settings: Settings, name: str, pool: str, cron: str | None = None, timezone: str | None = None
) -> Deployed:
    """Make or renew the deployment `retrain/<name>` in a work pool, which is made if it is not there.

    Runs of it never overlap: one that is due meanwhile waits.

    Raises:
        InputError: the cron expression or time zone is wrong, or the pool is of a kind that needs an image.
        StepError: the local server did not come up.
    """
    zone = timezone or local_timezone()
    if cron is not None:
        next_fire_times(cron, zone)
    api_url = lasting_api()
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.schedules import Cron
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.types.entrypoint import EntrypointType

    from flows.retrain import check_registry, retrain

    check_registry(settings)
    with temporary_settings({PREFECT_API_URL: api_url}):
        made = _ensure_pool(pool)
        deployment: Any = retrain.to_deployment(
            name,
            schedule=Cron(cron, timezone=zone) if cron else None,
            parameters={"settings": settings.model_dump(mode="json", by_alias=True)},
            concurrency_limit=ConcurrencyLimitConfig(
                limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE
            ),
            entrypoint_type=EntrypointType.MODULE_PATH,
            work_pool_name=pool,
            # A worker starts Prefect without our command: the log lines of our packages are to reach it.
            job_variables={"env": {"PREFECT_LOGGING_EXTRA_LOGGERS": ",".join(OURS)}},
        )
        deployment.apply()
    return Deployed(f"{retrain.name}/{name}", pool, api_url, made)


def _ensure_pool(name: str) -> bool:
    """See that the pool is there and runs plain processes; whether it had to be made."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            found = client.read_work_pool(name)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=name, type=POOL_TYPE))
            return True
    if found.type != POOL_TYPE:
        raise InputError(
            f"--pool {name}: is of type {found.type}, which needs an image of your own; give a pool of type "
            f"{POOL_TYPE}, or deploy through prefect.yaml"
        )
    return False
