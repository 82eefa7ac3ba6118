"""Fuse, as a task of Prefect."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.config import FuseSettings
from tasks.fuse.merge import fuse_adapter
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput


@task(task_run_name="fuse", cache_policy=NO_CACHE)
def fuse(settings: FuseSettings, model: ModelFolder, adapter: StepOutput, data: StepOutput) -> StepOutput:
    """The merged model as an MLX model folder."""
    return fuse_adapter(settings, model, adapter, data)
