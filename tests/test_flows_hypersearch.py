"""The search flow through Prefect into MLflow: trials, the finetune of the best, commands, a kill, a stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType

from flows.clean import close_flow_runs
from flows.cli import run
from flows.hypersearch import SearchOutcome, hypersearch
from flows.resume import settings_as_yaml
from search.study import create_study, open_study, read_study
from tasks.config import Settings, TrackingSettings, load_settings
from tasks.home import CHECKOUT
from tasks.models.folder import ModelFolder
from tasks.tracking import connect, nested_runs

pytestmark = pytest.mark.usefixtures("prefect_harness")


def small(tiny_model: ModelFolder, folder: Path, *overrides: str) -> Settings:
    """Three trials of eight updates on 60 rows."""
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(60)]
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [
        "name=sums",
        f"model.source={tiny_model.path}",
        f"data.source={data}",
        "train.max_steps=8",
        "train.minutes_per_save=99",
        "evaluate.samples=1",
        "evaluate.max_tokens=4",
        "evaluate.general_rows=0",
        "search.trials=3",
        "search.budget=30MB",
        "search.first_rung=0.3",
        "search.learning_rate={low: 1e-3, high: 1e-1, log: true}",
        "search.rank=[2, 4096]",
        "search.num_layers=[1, 2]",
        "search.workers=1",
    ]
    return load_settings(None, [*given, *overrides])


@pytest.fixture(scope="module")
def searched(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelFolder
) -> Iterator[tuple[SearchOutcome, Path]]:
    """A whole search in a home of its own."""
    home = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(home))
        patch.setenv("TUNESMITH_CACHE", str(home / "cache"))
        patch.setenv("MLX_DISABLE_COMPILE", "1")
        yield hypersearch(small(tiny_model, home)), home


@pytest.fixture
def outcome(searched: tuple[SearchOutcome, Path], monkeypatch: pytest.MonkeyPatch) -> SearchOutcome:
    monkeypatch.setenv("TUNESMITH_HOME", str(searched[1]))
    monkeypatch.setenv("TUNESMITH_CACHE", str(searched[1] / "cache"))
    return searched[0]


def test_trials_are_nested_and_what_is_over_the_budget_is_never_started(outcome: SearchOutcome) -> None:
    states = [trial.state for trial in outcome.trials]
    assert states.count("trained") == 1
    assert states.count("pruned") == 2
    assert all((t.state == "over budget") == (t.params["rank"] > 2) for t in outcome.trials)
    assert all(t.standing.measured_bytes <= outcome.budget_bytes for t in outcome.trials)
    nested = nested_runs(outcome.run)
    assert len(nested) == 3
    assert {run.tags["optuna.study"] for run in nested} == {outcome.study}
    assert all(run.tags["prefect.flow_run_id"] for run in nested)


def test_the_best_is_finetuned_from_its_own_checkpoint_evaluated_fused_and_registered(
    outcome: SearchOutcome,
) -> None:
    assert outcome.best is not None
    stored = outcome.run.client.get_run(outcome.best_run)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == f"{outcome.study}-best"
    assert "train" in stored.data.tags["tunesmith.reused"]
    assert stored.data.metrics["best_val_loss"] == outcome.best.val_loss
    assert "test_loss" in stored.data.metrics
    assert outcome.run.client.search_model_versions(f"run_id='{outcome.best_run}'")


def test_study_search_and_finetune_name_each_other(outcome: SearchOutcome) -> None:
    client = outcome.run.client
    parent = client.get_run(outcome.run.id).data.tags
    best = client.get_run(outcome.best_run).data.tags
    study = read_study(outcome.study)
    assert outcome.best is not None
    assert parent["optuna.study"] == best["optuna.study"] == outcome.study
    assert parent["tunesmith.best_run"] == outcome.best_run
    assert best["tunesmith.search_run"] == outcome.run.id
    assert best["optuna.trial"] == parent["optuna.best_trial"] == str(outcome.best.number)
    assert study.attributes["mlflow.run_id"] == outcome.run.id
    assert study.attributes["best_run"] == outcome.best_run
    assert parent["prefect.flow_run_id"] in study.attributes["prefect.flow_run_ids"]


def test_leaderboard_plots_and_findings_are_artifacts(outcome: SearchOutcome) -> None:
    client = outcome.run.client
    names = {each.path for each in client.list_artifacts(outcome.run.id)}
    assert {"leaderboard.json", "findings.txt", "plots"} <= names
    plots = {each.path for each in client.list_artifacts(outcome.run.id, "plots")}
    assert {f"plots/{name}.png" for name in ("history", "rungs", "memory", "slice", "contour")} <= plots


def test_the_study_is_shown_and_told_in_json(
    outcome: SearchOutcome, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["study"]) == 0
    shown = capsys.readouterr().out
    assert "pruned" in shown
    assert "did not fit the budget" in shown
    assert run(["study", outcome.study, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["trials"][0]["number"] == outcome.best.number  # type: ignore[union-attr]
    assert told["finished"]
    assert told["best_run"] == outcome.best_run


def test_a_finished_search_is_not_resumed(outcome: SearchOutcome, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["search", "--resume", outcome.study]) == 2
    assert "is finished" in capsys.readouterr().err
    assert run(["search", "--resume"]) == 2
    assert "no search is unfinished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search"], "give a YAML file of settings"),
        (["search", "--resume", "none"], "study 'none': no such study"),
        (["search", "--resume", "none", "--trials", "3"], "--resume with search.trials=3"),
        (["search", "flows/configs/search.yaml", "--trials", "3", "--time", "8h"], "give one of them"),
        (["search", "flows/configs/search.yaml", "--time", "soon"], "search.time = 'soon'"),
        (["study"], "there is no study yet"),
        (["study", "none"], "study 'none'"),
    ],
)
def test_wrong_input_is_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


STOPPED = """
import os, signal, sys
from flows.cli import main
from search import trials

plain, number = trials.Search._hear, getattr(signal, sys.argv[1])

def hear(search, child, message, children):
    plain(search, child, message, children)
    if isinstance(message, trials.Done) and len(search.study.trials) == 2:
        os.kill(os.getpid(), number)

trials.Search._hear = hear
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C
sys.argv[1:] = ["search", sys.argv[2]]
main()
"""


def start_and_stop(config: Path, number: str) -> subprocess.CompletedProcess[str]:
    """`tunesmith search CONFIG`, which gets a signal when its second trial has reached its rung."""
    from prefect.settings import PREFECT_API_URL

    return subprocess.run(
        [sys.executable, "-c", STOPPED, number, str(config)],
        cwd=CHECKOUT,
        env={**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value()), "MLX_DISABLE_COMPILE": "1"},
        capture_output=True,
        text=True,
    )


def flow_states(ids: list[str]) -> list[Any]:
    with get_client(sync_client=True) as client:
        return [client.read_flow_run(each).state.type for each in ids]  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize(
    ("number", "code", "status"),
    [("SIGKILL", -9, "RUNNING"), ("SIGINT", 130, "KILLED")],
)
@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on_and_leaves_nothing_running(
    number: str, code: int, status: str, tiny_model: ModelFolder, tmp_path: Path, home: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    config = tmp_path / "config.yaml"
    settings = small(tiny_model, tmp_path, "search.finetune=false", "search.rank=2", "search.budget=1GB")
    config.write_text(settings_as_yaml(settings))
    stopped = start_and_stop(config, number)
    assert stopped.returncode == code, stopped.stderr
    client, _, experiment = connect(TrackingSettings())
    [parent] = client.search_runs([experiment], "attributes.run_name LIKE 'sums-%'")
    assert parent.info.status == status
    [name] = {parent.info.run_name}
    before = open_study(name)
    assert [trial.state for trial in before.trials.values()] == ["waiting", "waiting"]
    if number == "SIGINT":
        assert f"--resume {name}" in " ".join(stopped.stderr.split())

    assert run(["search", "--resume"]) == 0
    after = read_study(name)
    assert sorted(trial.state for trial in after.trials.values()) == ["pruned", "pruned", "trained"]
    assert [trial.run_id for trial in after.trials.values()][:2] == [t.run_id for t in before.trials.values()]
    assert {each.info.status for each in client.search_runs([experiment])} == {"FINISHED"}
    assert after.attributes["finished"]
    first, second = flow_states(after.attributes["prefect.flow_run_ids"])
    assert first in (StateType.CRASHED, StateType.FAILED, StateType.CANCELLED)
    assert second == StateType.COMPLETED


def test_a_search_whose_data_have_changed_is_not_gone_on_with(
    tiny_model: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small(tiny_model, tmp_path)
    study = create_study("changed")
    study.remember(settings=settings_as_yaml(settings), finished=False, training="another")
    assert run(["search", "--resume", "changed"]) == 2
    assert "have changed since it began" in capsys.readouterr().err


def test_flow_runs_that_have_ended_are_left_as_they_are(outcome: SearchOutcome) -> None:
    ids = read_study(outcome.study).attributes["prefect.flow_run_ids"]
    assert close_flow_runs() == []
    assert flow_states(ids) == [StateType.COMPLETED]
