"""The trials in MLflow: a run for each under that of the search, open while the trial is trained.

Between its rungs a trial's run is FINISHED: a search that is killed leaves RUNNING what was at work then,
and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from search.study import GIGABYTE, Study, Trial
from tasks.config import Settings, TrainSettings, flatten
from tasks.errors import StepError
from tasks.tracking import NestedRun, Run, end_run, mlflow_run, nested_runs
from tasks.train.step import ADAPTER_FILES

OUTCOME, REASON, RUNG = "tunesmith.outcome", "tunesmith.reason", "tunesmith.rung"

STATUS = {"waiting": "KILLED", "failed": "FAILED", "infeasible": "FAILED"}
"""Of a run that was left RUNNING, by the state of its trial; FINISHED for the others."""


class TrialRuns:
    """The nested runs of one search.

    Args:
        parent: the run of the search.
        tags: that lead from every run to where it came from.
    """

    def __init__(self, settings: Settings, study: Study, parent: Run, tags: Mapping[str, str]) -> None:
        self._settings, self._study, self._parent, self._tags = settings, study, parent, tags
        self._open: dict[int, tuple[ExitStack, Run]] = {}

    def adopt(self) -> None:
        """End what a killed process has left RUNNING, and find the runs it could not link any more."""
        for nested in nested_runs(self._parent):
            number = int(nested.tags.get("optuna.trial", "-1"))
            trial = self._study.trials.get(number)
            if trial and not trial.run_id:
                self._study.link(number, nested.id)
            # `tunesmith clean`, which looks at every start too, may have closed it as killed.
            ended = trial is not None and trial.state != "waiting"
            if nested.status == "RUNNING" or (nested.status == "KILLED" and ended):
                self._end(nested, trial)

    def open(self, number: int, settings: TrainSettings) -> None:
        """Open the run of a trial that goes to work, a new one or the one it has."""
        trial = self._study.trials[number]
        whole = self._settings.model_copy(update={"train": settings})
        tags = {
            **self._tags,
            "optuna.study": self._study.name,
            "optuna.trial": str(number),
            OUTCOME: "waiting",
        }
        stack = ExitStack()
        run = stack.enter_context(
            mlflow_run(whole, f"trial-{number}", tags, self._parent, resumed=trial.run_id or None)
        )
        self._open[number] = stack, run
        if trial.run_id:
            run.log_params(flatten(whole))  # equal ones are taken: a kill may have come before them
        else:
            self._study.link(number, run.id)
        run.report(0, {"predicted_memory": trial.standing.predicted_bytes / GIGABYTE})

    def report(self, number: int, step: int, metrics: Mapping[str, float]) -> None:
        """Figures of a step of a trial at work."""
        self._open[number][1].report(step, metrics)

    def close(self, number: int) -> None:
        """Close the run of a trial that has come to a rung, to its end, or to grief."""
        trial = self._study.trials[number]
        stack, run = self._open.pop(number)
        with suppress(StepError), stack:
            run.report(trial.step, {"rung": len(trial.losses), **_figures(trial)})
            run.set_tags(_tags(trial))
            if trial.standing.adapter:
                run.log_files(Path(trial.standing.adapter), "adapter", only=ADAPTER_FILES)
            if trial.state in ("failed", "infeasible"):
                raise StepError(trial.standing.reason)

    def retag(self, trial: Trial) -> None:
        """Say what became of a trial that was not at work then."""
        if trial.run_id:
            self._run(trial.run_id).set_tags(_tags(trial))

    def _end(self, nested: NestedRun, trial: Trial | None) -> None:
        run = self._run(nested.id)
        if trial:
            run.set_tags(_tags(trial))
        end_run(run, STATUS.get(trial.state, "FINISHED") if trial else "KILLED")

    def _run(self, run_id: str) -> Run:
        return Run(run_id, self._parent.uri, self._parent.experiment_id)

    def __enter__(self) -> TrialRuns:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Trials that are at work when the search is stopped: KILLED, to be gone on with."""
        for number in list(self._open):
            stack, _ = self._open.pop(number)
            with suppress(KeyboardInterrupt), stack:
                raise KeyboardInterrupt


def _figures(trial: Trial) -> dict[str, float]:
    losses = {"best_val_loss": trial.val_loss} if trial.standing.val_losses else {}
    scores = {f"val_{name}": score for name, score in trial.standing.scores.items()}
    return {**losses, **scores, "measured_memory": trial.standing.measured_bytes / GIGABYTE}


def _tags(trial: Trial) -> dict[str, str]:
    rung = f"{len(trial.losses)} of {len(trial.standing.rung_steps)}"
    return {OUTCOME: trial.state, RUNG: rung, REASON: trial.standing.reason}
