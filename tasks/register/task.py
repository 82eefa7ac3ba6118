"""Register, as a task of Prefect."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.config import Settings
from tasks.evaluate.side_by_side import Evaluation
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput
from tasks.register.registry import Candidate, Registration, register_adapter
from tasks.tracking import Run


@task(task_run_name="register", cache_policy=NO_CACHE)
def register(
    settings: Settings,
    name: str,
    model: ModelFolder,
    adapter: StepOutput,
    data: StepOutput,
    evaluation: Evaluation,
    run: Run,
) -> Registration:
    """A new version of the registered model `name`, @challenger or @champion."""
    return register_adapter(settings, name, Candidate(model, adapter, data, evaluation), run)
