"""A search's memory: an Optuna study under `mlruns/optuna.db`, from which a killed search goes on.

A trial is added with its values, price and bracket in one transaction, and stays RUNNING while it is trained
or waits at a rung. What is known of it is one attribute, written whole at every rung, so that a kill
leaves the one state or the other. Attributes for people stand beside it: optuna-dashboard shows them.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from search.leftovers import PROCESS, STANDING
from search.rungs import Entrant, losses_at
from search.space import Params
from tasks.alive import this_process
from tasks.errors import InputError
from tasks.home import runs_dir

State = Literal["waiting", "trained", "pruned", "over budget", "infeasible", "failed"]

TOLD: dict[State, TrialState] = {
    "trained": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "over budget": TrialState.PRUNED,
    "infeasible": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
"""What Optuna is told; it knows what did not fit by a violated constraint."""

LOWEST_WANTED = ("loss", "memory", "time")
"""Objectives; the others are scores."""

GIGABYTE = 1e9


@dataclass(frozen=True)
class Standing:
    """What is known of a trial beside its values.

    Attributes:
        state: `waiting` for its next rung or in it; `over budget`, never started; `infeasible`, its process
            died of it; `failed`, as by a loss that is not finite.
        predicted_bytes: the peak memory expected of it.
        rung_steps: updates at each rung, the last is its end.
        first_rung: of its bracket.
        val_losses: (updates done, validation loss) so far, without that before training.
        ended_by: the setting that ended the training; empty until then.
        seconds: of training.
        measured_bytes: its peak memory.
        adapter: the folder of the published adapter, of a trained one.
        reason: why it stopped, where it did not come to its end.
        deaths: processes that were killed while they trained it.
        scores: of its answers, by name, where they are an objective.
    """

    state: State
    predicted_bytes: int
    rung_steps: tuple[int, ...]
    first_rung: int
    val_losses: tuple[tuple[int, float], ...] = ()
    ended_by: str = ""
    seconds: float = 0.0
    measured_bytes: int = 0
    adapter: str = ""
    reason: str = ""
    deaths: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One proposal and what became of it."""

    number: int
    params: Params
    standing: Standing
    run_id: str = ""

    @property
    def state(self) -> State:
        """What became of it."""
        return self.standing.state

    @property
    def losses(self) -> tuple[float, ...]:
        """The lowest validation loss up to each rung that it has reached."""
        return losses_at(self.standing.val_losses, self.standing.rung_steps, bool(self.standing.ended_by))

    @property
    def val_loss(self) -> float:
        """That of its best weights so far; NaN before its first rung."""
        return min((loss for _, loss in self.standing.val_losses), default=math.nan)

    @property
    def step(self) -> int:
        """Updates done when it was last heard of."""
        return max((step for step, _ in self.standing.val_losses), default=0)

    def entrant(self) -> Entrant:
        """As the rules of the rungs see it."""
        return Entrant(self.number, self.losses, self.state in ("infeasible", "failed"))


class Study:
    """A study in Optuna's storage and the trials it holds; written by one process at a time, see `held`."""

    def __init__(self, stored: optuna.Study) -> None:
        self.stored = stored
        self.trials = {
            frozen.number: _read(frozen)
            for frozen in stored.get_trials(deepcopy=False)
            if STANDING in frozen.user_attrs
        }

    def put_right(self) -> None:
        """Tell Optuna what became of trials, where a kill came between writing that down and telling."""
        for frozen in self.stored.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            trial = self.trials.get(frozen.number)
            if trial and trial.state != "waiting":
                self._tell(trial)

    @property
    def objectives(self) -> list[str]:
        """The names of what is searched for."""
        return list(self.stored.metric_names or ["loss"])

    @property
    def scores(self) -> list[str]:
        """Those of the objectives that are scores of answers."""
        return [name for name in self.objectives if name not in LOWEST_WANTED]

    def front(self) -> list[int]:
        """Numbers of the trained trials that no other is better than in all objectives."""
        trained = {
            n: objective_values(t, self.objectives) for n, t in self.trials.items() if t.state == "trained"
        }
        return [
            number
            for number, ours in trained.items()
            if not any(_dominates(theirs, ours) for theirs in trained.values())
        ]

    @property
    def name(self) -> str:
        """Of the study, and of its run in MLflow."""
        return self.stored.study_name

    @property
    def attributes(self) -> dict[str, Any]:
        """What `remember` was given."""
        return self.stored.user_attrs

    def remember(self, **attributes: Any) -> None:
        """Keep JSON values with the study."""
        for name, value in attributes.items():
            self.stored.set_user_attr(name, value)

    def add(
        self, params: Params, space: Mapping[str, BaseDistribution], standing: Standing, budget_bytes: int
    ) -> Trial:
        """Add a proposal with its price; one over the budget is finished by that."""
        over = standing.predicted_bytes / budget_bytes - 1
        template = optuna.trial.create_trial(
            state=TrialState.PRUNED if standing.state == "over budget" else TrialState.RUNNING,
            params=dict(params),
            distributions=dict(space),
            constraints={"memory": over},
            user_attrs={STANDING: _plain(standing), **_readable(standing), PROCESS: this_process()},
        )
        self.stored.add_trial(template)
        trial = Trial(len(self.stored.get_trials(deepcopy=False)) - 1, dict(params), standing)
        self.trials[trial.number] = trial
        return trial

    def update(self, number: int, **changes: Any) -> Trial:
        """Change what is known of a trial; one that is no longer `waiting` is told to Optuna."""
        before = self.trials[number]
        trial = replace(before, standing=replace(before.standing, **changes))
        handle = self._handle(number)
        handle.set_user_attr(STANDING, _plain(trial.standing))
        for name, value in _readable(trial.standing).items() - _readable(before.standing).items():
            handle.set_user_attr(name, value)
        self.trials[number] = trial
        if self.objectives == ["loss"]:
            known = self.stored.get_trials(deepcopy=False)[number].intermediate_values
            for step, loss in _best_so_far(trial.standing.val_losses):
                if step not in known:
                    handle.report(loss, step)
        if trial.state != "waiting":
            self._tell(trial)
        return trial

    def link(self, number: int, run_id: str) -> None:
        """Remember the MLflow run of a trial, and which process works on it."""
        handle = self._handle(number)
        handle.set_user_attr("mlflow.run_id", run_id)
        handle.set_user_attr(PROCESS, this_process())
        self.trials[number] = replace(self.trials[number], run_id=run_id)

    def best(self) -> Trial | None:
        """The trained trial that the first objective finds best, if any was trained."""
        trained = [trial for trial in self.trials.values() if trial.state == "trained"]
        return min(
            trained,
            key=lambda trial: (objective_values(trial, self.objectives)[0], trial.number),
            default=None,
        )

    def _handle(self, number: int) -> optuna.trial.Trial:
        frozen = self.stored.get_trials(deepcopy=False)[number]
        return optuna.trial.Trial(self.stored, frozen._trial_id)

    def _tell(self, trial: Trial) -> None:
        if trial.state == "infeasible":
            handle = self._handle(trial.number)
            if "process" not in handle.constraints:
                handle.set_constraint("process", 1.0)
        values = None
        if trial.state == "trained":
            found = objective_values(trial, self.objectives)
            values = [_sign(name) * value for name, value in zip(self.objectives, found, strict=True)]
        self.stored.tell(trial.number, values, state=TOLD[trial.state])


def objective_values(trial: Trial, objectives: Sequence[str]) -> tuple[float, ...]:
    """What is to be low of a trained trial: validation loss, peak memory (GB), training time (s), and scores
    of its answers with the other sign."""
    standing = trial.standing
    values = {
        "loss": trial.val_loss,
        "memory": standing.measured_bytes / GIGABYTE,
        "time": standing.seconds,
        **{name: -score for name, score in standing.scores.items()},
    }
    return tuple(values[name] for name in objectives)


def _sign(objective: str) -> int:
    """-1 of what is wanted high."""
    return 1 if objective in LOWEST_WANTED else -1


def create_study(name: str, objectives: Sequence[str] = ("loss",)) -> Study:
    """A new study; of a name that is there already, with a number after it."""
    with _set_up() as storage:
        taken = set(optuna.study.get_all_study_names(storage))
        chosen = name
        for number in range(2, len(taken) + 3):
            if chosen not in taken:
                break
            chosen = f"{name}-{number}"
        stored = optuna.create_study(
            study_name=chosen,
            storage=storage,
            directions=["minimize" if _sign(name) > 0 else "maximize" for name in objectives],
            pruner=optuna.pruners.NopPruner(),
        )
        with warnings.catch_warnings():  # optuna 5.0 calls it experimental; optuna-dashboard shows the names
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            stored.set_metric_names(list(objectives))
    return Study(stored)


def read_study(name: str) -> Study:
    """The study of this name, as it stands; nothing is written.

    Raises:
        InputError: there is none, with the names there are.
    """
    return Study(_load(name))


def open_study(name: str) -> Study:
    """The study of this name, for the process that holds it: what a killed one has left is put right."""
    study = read_study(name)
    study.put_right()
    return study


def study_names() -> list[str]:
    """The studies there are, newest first."""
    if not _database().exists():
        return []
    with _set_up() as storage:
        summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
    return [summary.study_name for summary in sorted(summaries, key=lambda each: -each._study_id)]


def unfinished_study() -> str:
    """The newest search that has not come to its end.

    Raises:
        InputError: there is none.
    """
    for name in study_names():
        if not _load(name).user_attrs.get("finished", True):
            return name
    raise InputError("no search is unfinished; 'tunesmith search CONFIG' starts one")


@contextmanager
def held(name: str) -> Iterator[None]:
    """Hold a study for the block: the system frees it when the process dies, however it does.

    Raises:
        InputError: another process works on it.
    """
    folder = runs_dir() / "searches"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name.replace('/', '_')}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"search '{name}' is running in another process; stop that first") from None
    try:
        yield
    finally:
        lock.release()


def storage_url() -> str:
    """Where Optuna keeps its studies, as optuna-dashboard takes it."""
    return f"sqlite:///{_database()}"


def _database() -> Path:
    return runs_dir() / "optuna.db"


def _load(name: str) -> optuna.Study:
    names = study_names()
    if name not in names:
        known = (
            f"there is {', '.join(names[:5])}" if names else "there is none yet; 'tunesmith search' makes one"
        )
        raise InputError(f"study '{name}': no such study in {storage_url()}; {known}")
    with _set_up() as storage:
        return optuna.load_study(study_name=name, storage=storage, pruner=optuna.pruners.NopPruner())


@contextmanager
def _set_up() -> Iterator[optuna.storages.RDBStorage]:
    """The storage; a fresh database is made by one process at a time."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    runs_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(runs_dir() / ".optuna.lock"):
        yield optuna.storages.RDBStorage(storage_url(), engine_kwargs={"connect_args": {"timeout": 60}})


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _plain(standing: Standing) -> str:
    return json.dumps(asdict(standing))


def _read(frozen: optuna.trial.FrozenTrial) -> Trial:
    plain = json.loads(frozen.user_attrs[STANDING])
    plain["rung_steps"] = tuple(plain["rung_steps"])
    plain["val_losses"] = tuple((step, loss) for step, loss in plain["val_losses"])
    return Trial(frozen.number, frozen.params, Standing(**plain), frozen.user_attrs.get("mlflow.run_id", ""))


def _readable(standing: Standing) -> dict[str, Any]:
    """For those who look at the study in optuna-dashboard."""
    losses = losses_at(standing.val_losses, standing.rung_steps, bool(standing.ended_by))
    shown = {
        "outcome": standing.state,
        "predicted_gb": round(standing.predicted_bytes / GIGABYTE, 3),
        "measured_gb": round(standing.measured_bytes / GIGABYTE, 3),
        "rung": len(losses),
        "reason": standing.reason,
        "adapter": standing.adapter,
    }
    return {name: value for name, value in shown.items() if value or name in ("outcome", "rung")}


def _best_so_far(val_losses: Sequence[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    best = math.inf
    for step, loss in val_losses:
        best = min(best, loss)
        yield step, best
