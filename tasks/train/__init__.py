"""Train: base model and prepared data in, the best adapter out."""

from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from tasks.config import TrainSettings
from tasks.errors import InputError, StepError
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput
from tasks.tracking import Run
from tasks.train.step import train_adapter


def may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed training is worth another start, which goes on from the newest checkpoint.

    A tracking server that did not answer and a GPU that timed out are; settings and rows that are
    wrong stay wrong, and a loss that was not finite comes back at the same step.
    """
    return not isinstance(state.data, InputError | StepError)


@task(
    task_run_name="train",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=may_pass,
)
def train(settings: TrainSettings, model: ModelFolder, data: StepOutput, run: Run) -> StepOutput:
    """The best adapter of a training run, in mlx-lm's layout."""
    return train_adapter(settings, model, data, run)
