"""Import the base model, as a task of Prefect."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.config import ModelSettings
from tasks.models.folder import ModelFolder
from tasks.models.resolve import resolve_model


@task(task_run_name="import model", cache_policy=NO_CACHE)
def import_model(settings: ModelSettings) -> ModelFolder:
    """Find the base model, import it if it is a GGUF file, and fingerprint it."""
    return resolve_model(settings)
