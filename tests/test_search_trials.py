"""A search with real children on a tiny model: budget, rungs, deaths, and what is left behind."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from small_search import InProcess, ending, price, run_search, small_settings

from search import trials as trials_module
from search.children import Children, Death
from search.findings import findings, ranked
from search.leftovers import PROCESS
from search.study import Standing, Study, create_study, held, open_study, read_study
from search.worker import Begin, Train
from tasks.config import DataSettings, EvaluateSettings, TrackingSettings
from tasks.errors import InputError
from tasks.evaluate.measure import answer_scores
from tasks.models.folder import ModelFolder
from tasks.prepare.pipeline import prepare_data
from tasks.prepare.splits import TokenRows, save_splits
from tasks.publish import StepOutput
from tasks.tracking import Run, connect, nested_runs
from tasks.train.step import train_adapter

GIGABYTE = 10**9


def prepared(folder: Path, rows: TokenRows) -> StepOutput:
    folder.mkdir()
    save_splits(folder, dict.fromkeys(("train", "valid", "test"), rows))
    return StepOutput(folder, "prepared", False, 0.0)


@pytest.fixture
def data(token_rows: TokenRows, tmp_path: Path) -> StepOutput:
    return prepared(tmp_path / "prepared", token_rows)


@pytest.fixture(autouse=True)
def plain_children(monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    """Children without MLX's compiler, as these tests are; MLflow's tables are there."""
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes, where it is the order of things that counts."""
    monkeypatch.setattr(trials_module, "Children", InProcess)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelFolder, migrated: Path
) -> Iterator[tuple[Study, Path, StepOutput]]:
    """One undisturbed search with two children, in a home of its own."""
    home = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(home))
        patch.setenv("TUNESMITH_CACHE", str(home / "cache"))
        patch.setenv("MLX_DISABLE_COMPILE", "1")
        shutil.copyfile(migrated, home / "mlflow.db")
        data = prepared(home / "prepared", _rows())
        yield run_search(small_settings(), tiny_model, data), home, data


def _rows() -> TokenRows:
    import numpy as np

    random = np.random.default_rng(3)
    lengths = random.integers(5, 40, 13)
    return TokenRows.from_rows(
        [(random.integers(3, 300, n).tolist(), [place >= n // 2 for place in range(n)]) for n in lengths]
    )


@pytest.fixture
def in_its_home(finished: tuple[Study, Path, StepOutput], monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setenv("TUNESMITH_HOME", str(finished[1]))
    monkeypatch.setenv("TUNESMITH_CACHE", str(finished[1] / "cache"))
    return finished[0]


def search_run(name: str = "small") -> Run:
    client, uri, experiment = connect(TrackingSettings())
    [stored] = client.search_runs([experiment], f"tags.`mlflow.runName` = '{name}'")
    return Run(stored.info.run_id, uri, experiment)


def test_six_trials_reach_the_first_rung_and_the_best_two_their_end(in_its_home: Study) -> None:
    study = in_its_home
    assert len(study.trials) == 6
    at_rung = sorted(study.trials.values(), key=lambda trial: trial.losses[0])
    assert {trial.state for trial in at_rung[:2]} == {"trained"}
    assert {trial.state for trial in at_rung[2:]} == {"pruned"}
    assert {trial.step for trial in at_rung[:2]} == {21}
    assert {trial.step for trial in at_rung[2:]} == {7}
    states = {trial.number: trial.state for trial in study.stored.get_trials()}
    assert all((states[t.number] == TrialState.COMPLETE) == (t.state == "trained") for t in at_rung)
    assert study.stored.best_trial.number == study.best().number  # type: ignore[union-attr]


def test_a_trial_equals_the_same_settings_trained_alone(
    in_its_home: Study, finished: tuple[Study, Path, StepOutput], tiny_model: ModelFolder, home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from test_train_trial import Unrecorded, digest

    best = in_its_home.best()
    assert best is not None
    data = finished[2]
    settings = small_settings()
    wanted, _ = trials_module.Search(
        in_its_home, settings, tiny_model, data, 10**12, price, None  # type: ignore[arg-type]
    ).settings_of(best.params)  # fmt: skip
    monkeypatch.setenv("TUNESMITH_HOME", str(home))  # where nothing is to be found again
    monkeypatch.setenv("TUNESMITH_CACHE", str(home / "cache"))
    alone = train_adapter(wanted, tiny_model, data, Unrecorded())
    assert not alone.reused
    assert digest(Path(best.standing.adapter)) == digest(alone.path)
    losses = [metrics["val_loss"] for step, metrics in alone.read_json("training.json")["history"]
              if step and "val_loss" in metrics]  # fmt: skip
    assert [loss for _, loss in best.standing.val_losses] == losses


def test_every_trial_is_a_nested_run_with_params_curve_memory_and_reason(in_its_home: Study) -> None:
    parent = search_run()
    nested = nested_runs(parent)
    assert [run.status for run in nested] == ["FINISHED"] * 6
    for run in nested:
        trial = in_its_home.trials[int(run.tags["optuna.trial"])]
        assert trial.run_id == run.id
        assert run.tags["optuna.study"] == "small"
        assert run.tags["tunesmith.outcome"] == trial.state
        stored = parent.client.get_run(run.id).data
        assert float(stored.params["train.learning_rate"]) == trial.params["learning_rate"]
        assert stored.metrics["predicted_memory"] == trial.params["num_layers"]
        assert stored.metrics["measured_memory"] > 0
        points = parent.client.get_metric_history(run.id, "train_loss")
        assert [point.step for point in points] == list(range(1, trial.step + 1))
        if trial.state == "pruned":
            assert "2 went on" in run.tags["tunesmith.reason"]
            assert run.tags["tunesmith.rung"] == "1 of 2"


def test_nothing_is_left_running_and_no_checkpoint_is_left(
    in_its_home: Study, finished: tuple[Study, Path, StepOutput]
) -> None:
    assert not in_its_home.stored.get_trials(states=(TrialState.RUNNING,))
    assert not list(finished[1].glob("checkpoints/*/step-*"))


def test_optuna_shows_what_became_of_each_trial_to_people(in_its_home: Study) -> None:
    for trial in in_its_home.stored.get_trials():
        shown = trial.user_attrs
        assert shown["outcome"] in ("trained", "pruned")
        assert shown["predicted_gb"] >= 1
        assert shown["mlflow.run_id"]
        assert str(os.getpid()) in shown[PROCESS]
        assert trial.intermediate_values


def test_going_on_with_a_finished_search_does_nothing(
    in_its_home: Study, finished: tuple[Study, Path, StepOutput], tiny_model: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(*_: Any) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr(Children, "start", refuse)
    assert ending(run_search(small_settings(), tiny_model, finished[2])) == ending(in_its_home)


@pytest.mark.slow
def test_which_child_is_faster_decides_nothing(
    in_its_home: Study, finished: tuple[Study, Path, StepOutput], tiny_model: ModelFolder, home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class LastFirst(InProcess):
        """Of two children at work the one that began later is heard first."""

        def messages(self, timeout_s: float) -> Iterator[tuple[Any, Any]]:
            here = self._at_work[-1]
            yield here, here.receive()

    monkeypatch.setenv("TUNESMITH_HOME", str(home))
    monkeypatch.setattr(trials_module, "Children", LastFirst)
    assert ending(run_search(small_settings(), tiny_model, finished[2])) == ending(in_its_home)


@pytest.mark.usefixtures("in_process")
def test_what_is_over_the_budget_is_never_started_and_infeasible_in_optuna(
    tiny_model: ModelFolder, data: StepOutput
) -> None:
    settings = small_settings(num_layers=[1, 4], trials=4, train={"epochs": 1})
    study = run_search(settings, tiny_model, data, budget_bytes=2 * GIGABYTE)
    over = {trial.number for trial in study.trials.values() if trial.state == "over budget"}
    assert over
    assert over == {n for n, trial in study.trials.items() if trial.params["num_layers"] == 4}
    assert len(study.trials) - len(over) == 4
    for trial in study.stored.get_trials():
        assert (max(trial.constraints.values()) > 0) == (trial.number in over)
        assert (trial.state == TrialState.PRUNED and not trial.intermediate_values) == (trial.number in over)
    assert len(nested_runs(search_run())) == 4, "no run for what was not started"
    best = study.best()
    assert best is not None
    assert best.number not in over


@pytest.mark.usefixtures("in_process")
def test_a_budget_that_nothing_fits_ends_instead_of_proposing_for_ever(
    tiny_model: ModelFolder, data: StepOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials_module.Search, "_record_prefixes", lambda *_: None)
    study = run_search(small_settings(trials=2), tiny_model, data, budget_bytes=1)
    assert {trial.state for trial in study.trials.values()} == {"over budget"}
    assert len(study.trials) == 20
    assert study.best() is None


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_finite_space_ends_when_everything_was_tried(tiny_model: ModelFolder, data: StepOutput) -> None:
    settings = small_settings(learning_rate=[1e-3, 1e-2], rank=2, num_layers=1, trials=9, train={"epochs": 1})
    study = run_search(settings, tiny_model, data)
    assert len(study.trials) == 2
    assert study.attributes["closed"]


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_search_for_a_time_proposes_until_what_is_left_is_needed_by_the_best(
    tiny_model: ModelFolder, data: StepOutput
) -> None:
    study = run_search(small_settings(time="4s", train={"epochs": 1}), tiny_model, data)
    trials = study.trials.values()
    assert len(trials) > 1
    assert study.attributes["closed"]
    assert sum(trial.state == "trained" for trial in trials) == max(1, len(trials) // 3)
    assert not any(trial.state == "waiting" for trial in trials)


class Killed:
    """Kills the child that trains the first trial, so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, times: int) -> None:
        self.plain, self.number, self.times = Children.start, number, times
        self.starts: list[float] = []
        monkeypatch.setattr(Children, "start", lambda children, order: self.start(children, order))

    def start(self, children: Children, order: Any) -> Any:
        child = self.plain(children, order)
        if isinstance(order, Train):
            self.starts.append(order.settings.learning_rate)
            if self.times and self.starts[-1] == self.starts[0]:
                self.times -= 1
                os.kill(child.process.pid, self.number)
        return child


SHORT: dict[str, Any] = {"trials": 3, "rungs": "none", "train": {"epochs": 1}}


@pytest.mark.parametrize(
    ("number", "times", "state", "starts"),
    [
        (signal.SIGKILL, 1, "trained", 2),
        pytest.param(signal.SIGSEGV, 1, "infeasible", 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 2, "infeasible", 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGABRT, 1, "infeasible", 1, marks=pytest.mark.slow),
    ],
)
def test_a_child_that_dies_costs_its_trial_at_most_and_never_the_search(
    number: signal.Signals, times: int, state: str, starts: int, tiny_model: ModelFolder, data: StepOutput,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    killed = Killed(monkeypatch, number, times)
    study = run_search(small_settings(**SHORT), tiny_model, data)
    states = [trial.state for trial in study.trials.values()]
    assert states == [state, "trained", "trained"]
    assert killed.starts.count(killed.starts[0]) == starts
    first = study.stored.get_trials()[0]
    assert (max(first.constraints.values()) > 0) == (state == "infeasible")
    if state == "infeasible":
        assert number.name in first.user_attrs["reason"]
        assert [run.status for run in nested_runs(search_run())].count("FAILED") == 1
    assert not study.stored.get_trials(states=(TrialState.RUNNING,))


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_two_trials_are_at_work_only_where_both_fit_the_budget(
    tiny_model: ModelFolder, data: StepOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []
    plain = InProcess.start

    def start(children: InProcess, order: Any) -> Any:
        here = plain(children, order)
        at_once.append(len(children._at_work))
        return here

    monkeypatch.setattr(InProcess, "start", start)
    for budget_gb, most in ((3, 1), (4, 2)):
        run_search(small_settings(num_layers=2, **SHORT), tiny_model, data, budget_gb * GIGABYTE)
        assert max(at_once) == most
        at_once.clear()
        monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "second"))


@pytest.mark.usefixtures("in_process")
def test_a_loss_that_is_not_finite_fails_its_trial_and_not_the_search(
    tiny_model: ModelFolder, data: StepOutput
) -> None:
    wanted = {**SHORT, "learning_rate": [1.0, 1e-3], "rank": 4, "num_layers": 2, "trials": 2}
    train = {"epochs": 2, "optimizer": "sgd", "scale": 1e30, "max_grad_norm": None, "warmup_steps": 0}
    study = run_search(small_settings(**{**wanted, "train": train}), tiny_model, data)
    by_rate = {trial.params["learning_rate"]: trial for trial in study.trials.values()}
    assert by_rate[1.0].state == "failed"
    assert "step" in by_rate[1.0].standing.reason
    assert study.stored.get_trials()[by_rate[1.0].number].state == TrialState.FAIL


@pytest.mark.usefixtures("in_process")
def test_an_allocation_failure_that_is_told_makes_the_trial_infeasible(
    tiny_model: ModelFolder, data: StepOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    from search import worker

    plain, failed = worker.train_trial, list[bool]()

    def train(*given: Any) -> Any:
        if not failed:
            failed.append(True)
            raise RuntimeError("[malloc] Unable to allocate 99 bytes")
        return plain(*given)

    monkeypatch.setattr(worker, "train_trial", train)
    study = run_search(small_settings(**SHORT), tiny_model, data)
    assert [trial.state for trial in study.trials.values()] == ["infeasible", "trained", "trained"]
    assert "Unable to allocate" in study.trials[0].standing.reason


def test_a_worker_that_cannot_start_ends_the_search_and_says_why(
    tiny_model: ModelFolder, data: StepOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.errors import StepError

    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    monkeypatch.setattr("search.children.sys.executable", "/bin/false")
    with pytest.raises(StepError, match="worker process exited with 1"):
        run_search(small_settings(**SHORT), tiny_model, data)


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_the_median_rule_stops_a_trial_in_a_real_search(tiny_model: ModelFolder, data: StepOutput) -> None:
    settings = small_settings(rungs="median", trials=9, train={"epochs": 1}, workers=1, num_layers=1, rank=2)
    study = run_search(settings, tiny_model, data)
    stopped = [trial for trial in study.trials.values() if trial.state == "pruned"]
    assert stopped
    assert all("over the median" in trial.standing.reason for trial in stopped)
    assert min(trial.number for trial in stopped) >= 5


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_of_several_objectives_a_front_is_found_within_the_budget(
    tiny_model: ModelFolder, data: StepOutput
) -> None:
    wanted: dict[str, Any] = {"objectives": ["loss", "memory"], "rungs": "none", "trials": 10}
    settings = small_settings(**wanted, num_layers=[1, 2, 4], rank=[2, 64], train={"epochs": 1})
    study = run_search(settings, tiny_model, data, budget_bytes=2 * GIGABYTE)
    trained = [trial for trial in study.trials.values() if trial.state == "trained"]
    assert len(trained) == 10
    assert {trial.number for trial in study.stored.best_trials} == set(study.front())
    smallest = min(trained, key=lambda trial: (trial.standing.measured_bytes, trial.val_loss))
    best = study.best()
    assert best is not None
    assert {best.number, smallest.number} <= set(study.front())
    assert any("loss and memory" in sentence for sentence in findings(study).sentences)
    for trial in study.stored.get_trials(states=(TrialState.COMPLETE,)):
        assert trial.values[1] == study.trials[trial.number].standing.measured_bytes / GIGABYTE


@pytest.mark.usefixtures("in_process")
def test_a_score_of_answers_chooses_the_best_and_is_wanted_high(
    tiny_model: ModelFolder, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n}+{n}?", "completion": f"It is {2 * n}."} for n in range(40)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare_data(DataSettings(source=str(path)), tiny_model)
    settings = small_settings(
        objectives=["chrf", "loss"], rungs="none", trials=3, train={"epochs": 1}
    ).model_copy(update={"evaluate": EvaluateSettings(samples=2, max_tokens=4)})
    study = run_search(settings, tiny_model, data, budget_bytes=2 * GIGABYTE)
    scores = {number: trial.standing.scores["chrf"] for number, trial in study.trials.items()}
    best = study.best()
    assert best is not None
    assert scores[best.number] == max(scores.values())
    assert ranked(study)[0].number == best.number
    assert [direction.name for direction in study.stored.directions] == ["MAXIMIZE", "MINIMIZE"]
    for trial in study.stored.get_trials(states=(TrialState.COMPLETE,)):
        assert trial.values == [scores[trial.number], study.trials[trial.number].val_loss]
    adapter = Path(study.trials[0].standing.adapter)
    assert answer_scores(settings.evaluate, tiny_model, adapter, data, "valid")["chrf"] == scores[0]


def test_what_became_of_a_trial_is_told_again_when_the_kill_came_before_it(in_its_home: Study) -> None:
    study = create_study("between")
    trial = study.add({}, {}, Standing("waiting", 1, (3,), 0), 10)
    handle = study.stored.get_trials()[0]
    done = Standing("trained", 1, (3,), 0, ((3, 1.5),), "epochs", 1.0, 1, "somewhere")
    study.stored._storage.set_trial_user_attr(handle._trial_id, "standing", json.dumps(asdict(done)))
    assert read_study("between").stored.get_trials()[0].state == TrialState.RUNNING
    assert open_study("between").trials[trial.number].state == "trained"
    assert open_study("between").stored.best_trial.value == 1.5


def test_a_study_is_held_by_one_process_at_a_time() -> None:
    create_study("mine")
    with held("mine"), pytest.raises(InputError, match="running in another process"), held("mine"):
        pass
    with held("mine"):
        pass


def test_an_unknown_study_is_named_with_those_there_are() -> None:
    with pytest.raises(InputError, match="there is none yet"):
        open_study("none")
    create_study("one")
    with pytest.raises(InputError, match=r"study 'two': no such study .*there is one"):
        open_study("two")
    assert create_study("one").name == "one-2"


def test_a_death_names_the_signal_and_what_the_child_said_last(
    tiny_model: ModelFolder, data: StepOutput
) -> None:
    with Children(Begin(tiny_model, data, EvaluateSettings()), 1) as children:
        child = children.start(Train(small_settings().train, None, 10**12, 10**12))
        os.kill(child.process.pid, signal.SIGABRT)
        while not isinstance(message := child.receive(), Death):
            pass
        children.lose(child)
    assert message.aborted
    assert "SIGABRT" in message.reason


def test_reading_a_study_changes_nothing_in_it(in_its_home: Study) -> None:
    before = [trial.user_attrs for trial in in_its_home.stored.get_trials()]
    assert math.isfinite(read_study("small").best().val_loss)  # type: ignore[union-attr]
    assert [trial.user_attrs for trial in in_its_home.stored.get_trials()] == before
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING
