"""The steps of a finetune: what follows from what, and what a run says of each of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

from tasks.errors import StepError
from tasks.patience import patience

if TYPE_CHECKING:
    from prefect import Task

    from tasks.config import FlowSettings
    from tasks.report.finished import Finished, StepDone

log = logging.getLogger(__name__)

Step = Literal["prepare", "train", "evaluate", "fuse", "register"]
"""What can be done anew by name; the report is written every time."""

FOLLOWS: dict[str, tuple[str, ...]] = {
    "prepare": ("train", "evaluate", "fuse", "register"),
    "train": ("evaluate", "fuse", "register"),
    "evaluate": (),
    "fuse": (),
    "register": (),
}
"""The steps that read what a step makes; registering reads figures, and keeps the version of an adapter."""

ARTIFACT = "steps"
"""Under this key Prefect's UI keeps what became of the steps of every run."""


def and_what_follows(steps: Iterable[str]) -> frozenset[str]:
    """The steps with all that depend on them: a forced training may not end in the very same weights."""
    return frozenset(name for step in steps for name in (step, *FOLLOWS[step]))


Given = ParamSpec("Given")
Made = TypeVar("Made")


def patiently(settings: FlowSettings) -> Callable[[Task[Given, Made]], Callable[Given, Made]]:
    """A step's task as these settings want it: tried again where that may help, for so long and no longer.

    Called, it raises `StepError` where the step took longer than `flow.step_minutes`.
    """
    from prefect.task_engine import TaskRunTimeoutError

    def of_step(task: Task[Given, Made]) -> Callable[Given, Made]:
        patient = task.with_options(**patience(settings))

        def step(*given: Given.args, **named: Given.kwargs) -> Made:
            try:
                return patient(*given, **named)
            except TaskRunTimeoutError:
                raise StepError(
                    f"{task.name} took longer than flow.step_minutes = {settings.step_minutes:g}; raise it, "
                    "and 'tunesmith resume' goes on from the last checkpoint"
                ) from None

        return step

    return of_step


def tell_steps(finished: Finished) -> None:
    """Say in MLflow and in Prefect which steps were reused, and of the others why they were not."""
    done = finished.steps()
    finished.run.set_tags(
        {
            "tunesmith.reused": ", ".join(finished.reused()),
            "tunesmith.made": "; ".join(f"{step.name}: {step.why}" for step in done if not step.reused),
        }
    )
    try:
        from prefect.artifacts import create_markdown_artifact

        create_markdown_artifact(steps_markdown(done), ARTIFACT, "what was reused, and why something was not")
    except Exception as error:  # a run is not lost for want of it
        log.warning("what became of the steps is not in Prefect: %s: %s", type(error).__name__, error)


def steps_markdown(done: Sequence[StepDone]) -> str:
    """A line a step."""
    lines = ["| step | | time | why |", "|---|---|---|---|"]
    for step in done:
        what = "reused" if step.reused else "made"
        why = "nothing it depends on has changed" if step.reused else step.why.replace("|", "\\|")
        lines.append(f"| {step.name} | {what} | {step.seconds:.1f} s | {why} |")
    return "\n".join(lines)
