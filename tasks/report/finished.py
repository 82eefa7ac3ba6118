"""Everything a finished run has to tell, as the report is given it."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.changes import FIRST
from tasks.config import Settings
from tasks.evaluate.side_by_side import Evaluation
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput
from tasks.register.registry import Registration
from tasks.tracking import Run

NEW_VERSION = "a new version"
"""Why a model was registered."""


@dataclass(frozen=True)
class StepDone:
    """What became of a step in a run: its output was there already, or was made and `why`."""

    name: str
    reused: bool
    seconds: float
    why: str

    @property
    def changed(self) -> bool:
        """Whether it was made because something has changed, and not for the first time."""
        return not self.reused and self.why not in (FIRST, NEW_VERSION)


@dataclass(frozen=True)
class Finished:
    """Everything a finished run has to tell.

    `fused` and `registration` are None when their sections are disabled.
    """

    name: str
    settings: Settings
    model: ModelFolder
    data: StepOutput
    adapter: StepOutput
    evaluation: Evaluation
    fused: StepOutput | None
    registration: Registration | None
    run: Run

    def reused(self) -> list[str]:
        """The steps that found their output already made."""
        return [step.name for step in self.steps() if step.reused]

    def steps(self) -> list[StepDone]:
        """Every step of the run in its order, with why it was done."""
        outputs: dict[str, StepOutput | Evaluation] = {
            "prepare": self.data,
            "train": self.adapter,
            "evaluate": self.evaluation,
        }
        if self.fused is not None:
            outputs["fuse"] = self.fused
        done = [StepDone(name, made.reused, made.seconds, made.why) for name, made in outputs.items()]
        if told := self.registration:
            done.append(StepDone("register", told.reused, 0.0, "" if told.reused else NEW_VERSION))
        return done
