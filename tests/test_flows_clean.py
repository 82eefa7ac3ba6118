"""What a power cut leaves RUNNING is closed in all three systems, and nothing that lives is touched."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.states import Running

from flows.clean import LABEL
from flows.cli import run as command
from flows.finetune import finetune
from flows.flow_run import begin_flow_run, close_mlflow_runs
from flows.retrain import retrain
from search.leftovers import PROCESS as TRIAL_PROCESS
from search.leftovers import fail_trials
from tasks.alive import is_gone, this_process
from tasks.config import Settings, TrackingSettings
from tasks.leftovers import FLOW_RUN, PARENT_FLOW_RUN, close_runs
from tasks.tracking import ERROR, PROCESS, connect


@pytest.fixture
def dead() -> str:
    """A process of this machine that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    host, _, _ = this_process().rsplit(" ", 2)
    told = f"{host} {child.pid} {psutil.Process(child.pid).create_time():.2f}"
    assert not is_gone(told)
    child.kill()
    child.wait()
    return told


@pytest.fixture
def elsewhere(dead: str) -> str:
    _, pid, started = dead.rsplit(" ", 2)
    return f"another-machine {pid} {started}"


def running(process: str, **tags: str) -> str:
    client, _, experiment = connect(TrackingSettings())
    given = {PROCESS: process} if process else {}
    opened = client.create_run(experiment, tags={**given, **tags}, run_name=f"of {process[:9]}")
    return str(opened.info.run_id)


def stored(run_id: str) -> Any:
    client, _, _ = connect(TrackingSettings())
    return client.get_run(run_id)


def test_a_process_is_known_as_gone_by_its_number_and_the_time_of_its_start(
    dead: str, elsewhere: str
) -> None:
    assert is_gone(dead)
    assert not is_gone(this_process())
    assert not is_gone(elsewhere)
    assert not is_gone("")
    host, pid, started = this_process().rsplit(" ", 2)
    assert is_gone(f"{host} {pid} {float(started) - 3600:.2f}"), "the number was given again"
    assert not is_gone(f"{host} {pid} {float(started) - 2:.2f}"), "the clock was set"


def test_a_child_that_nobody_has_waited_for_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    host, _, _ = this_process().rsplit(" ", 2)
    told = f"{host} {child.pid} {psutil.Process(child.pid).create_time():.2f}"
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert is_gone(told)
    child.wait()


@pytest.mark.usefixtures("store")
def test_runs_of_dead_processes_are_killed_as_of_their_last_sign_of_life(dead: str, elsewhere: str) -> None:
    left, lives, far, unknown = (running(who) for who in (dead, this_process(), elsewhere, ""))
    client, _, _ = connect(TrackingSettings())
    last_ms = stored(left).info.start_time + 4711
    client.log_metric(left, "train_loss", 2.0, timestamp=last_ms, step=3)
    assert [run.run_id for run in close_runs(TrackingSettings())] == [left]
    assert stored(left).info.status == "KILLED"
    assert stored(left).info.end_time == last_ms
    assert dead in stored(left).data.tags[ERROR]
    assert [stored(run).info.status for run in (lives, far, unknown)] == ["RUNNING"] * 3
    assert close_runs(TrackingSettings()) == []


@pytest.mark.usefixtures("store")
def test_a_hook_closes_the_runs_of_its_flow_run_only(dead: str) -> None:
    parameters = {"settings": Settings().model_dump(mode="json", by_alias=True)}
    flow_run: Any = SimpleNamespace(id="flow-1", name="nightly", parameters=parameters)
    state: Any = SimpleNamespace(name="Crashed")
    own = running(dead, **{FLOW_RUN: "flow-1"})
    of_subflow = running(dead, **{FLOW_RUN: "flow-2", PARENT_FLOW_RUN: "flow-1"})
    other = running(dead, **{FLOW_RUN: "flow-3"})
    close_mlflow_runs(flow=finetune, flow_run=flow_run, state=state)
    assert [stored(run).info.status for run in (own, of_subflow, other)] == ["KILLED", "KILLED", "RUNNING"]


@pytest.mark.parametrize("deployed", [finetune, retrain])
def test_flows_call_the_hook_however_they_end(deployed: Any) -> None:
    for hooks in (deployed.on_failure_hooks, deployed.on_crashed_hooks, deployed.on_cancellation_hooks):
        assert close_mlflow_runs in hooks


@pytest.fixture
def study(home: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(study_name="sums", storage=f"sqlite:///{home / 'optuna.db'}")


@pytest.mark.usefixtures("store")
def test_trials_of_dead_processes_fail_by_their_own_sign_or_by_that_of_their_mlflow_run(
    study: optuna.Study, dead: str
) -> None:
    signed, alive, by_run, unknown = (study.ask() for _ in range(4))
    signed.set_user_attr(TRIAL_PROCESS, dead)
    alive.set_user_attr(TRIAL_PROCESS, this_process())
    running(dead, **{"optuna.study": "sums", "optuna.trial": str(by_run.number)})
    assert fail_trials([("sums", by_run.number)]) == ["sums trial 0", "sums trial 2"]
    states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    assert states == ["FAIL", "RUNNING", "FAIL", "RUNNING"]
    assert unknown.number == 3


def test_without_a_study_no_database_is_made(home: Path) -> None:
    assert fail_trials() == []
    assert not (home / "optuna.db").exists()


@flow(name="left running")
def nothing() -> None:
    pass


def left_running(process: str) -> Any:
    """A flow run that says it is running in a process."""
    with get_client(sync_client=True) as client:
        made = client.create_flow_run(nothing, state=Running())
        client.update_flow_run_labels(made.id, {LABEL: process})
        return made


@pytest.mark.usefixtures("prefect_harness", "store")
def test_clean_closes_all_three_and_the_command_says_so(
    dead: str, elsewhere: str, study: optuna.Study, capsys: pytest.CaptureFixture[str]
) -> None:
    killed, far, alive = (left_running(who) for who in (dead, elsewhere, this_process()))
    run_id = running(dead, **{"optuna.study": "sums", "optuna.trial": str(study.ask().number)})
    assert command(["clean"]) == 0
    told = capsys.readouterr().err
    assert run_id[:8] in told
    assert killed.name in told
    assert "sums trial 0" in told
    with get_client(sync_client=True) as client:
        states = {each.name: client.read_flow_run(each.id).state for each in (killed, far, alive)}
        assert [state and state.type for state in states.values()] == [
            StateType.CRASHED, StateType.RUNNING, StateType.RUNNING,
        ]  # fmt: skip
        client.delete_flow_run(alive.id)
        client.delete_flow_run(far.id)
    assert command(["clean"]) == 0
    assert "nothing was left running" in capsys.readouterr().err


@flow(name="begins")
def begins(settings: Settings) -> None:
    begin_flow_run(settings)


@pytest.mark.usefixtures("prefect_harness", "store")
def test_every_start_signs_its_flow_run_and_closes_what_is_left(dead: str) -> None:
    run_id = running(dead)
    left = left_running(dead)
    state = begins(Settings(), return_state=True)
    with get_client(sync_client=True) as client:
        signed = client.read_flow_run(state.state_details.flow_run_id)  # type: ignore[arg-type]
        after = client.read_flow_run(left.id).state
    assert signed.labels[LABEL] == this_process()
    assert after is not None
    assert after.type == StateType.CRASHED
    assert stored(run_id).info.status == "KILLED"


def test_a_start_goes_on_when_what_is_left_cannot_be_looked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import flows.clean

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr("prefect.runtime.flow_run.get_id", lambda: "00000000-0000-0000-0000-000000000000")
    monkeypatch.setattr(flows.clean, "sign_flow_run", fail)
    begin_flow_run(Settings())
    assert "the server is gone" in caplog.text
