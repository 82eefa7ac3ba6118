"""Train, as a task of Prefect."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.config import FlowSettings, TrainSettings
from tasks.models.folder import ModelFolder
from tasks.patience import patience
from tasks.publish import StepOutput
from tasks.tracking import Run
from tasks.train.step import train_adapter


@task(task_run_name="train", cache_policy=NO_CACHE, **patience(FlowSettings()))
def train(settings: TrainSettings, model: ModelFolder, data: StepOutput, run: Run) -> StepOutput:
    """The best adapter of a training run, in mlx-lm's layout."""
    return train_adapter(settings, model, data, run)
