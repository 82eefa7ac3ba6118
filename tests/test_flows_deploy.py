"""Schedules: bad ones are refused before anything starts, good ones really start runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import psutil
import pytest

from flows import deploy as module
from flows import work_pool
from flows.deploy import local_timezone, next_fire_times, schedule
from flows.server import ServerState, down, free_port, up
from tasks.config import Settings, TrackingSettings, load_settings
from tasks.errors import InputError
from tasks.home import CHECKOUT
from tasks.models.folder import ModelFolder
from tasks.tracking import connect


@pytest.mark.parametrize("cron", ["", "2 am", "99 2 * * *", "0 2 * *", "R 2 * * *"])
def test_a_wrong_cron_expression_is_named_with_an_example(cron: str) -> None:
    with pytest.raises(InputError, match=r"cron '.*': not a cron expression.*0 2 \* \* \*") as error:
        next_fire_times(cron, "UTC")
    assert f"'{cron}'" in str(error.value)


def test_a_cron_expression_that_never_comes_true_is_refused() -> None:
    with pytest.raises(InputError, match=r"0 0 30 2 \*': never comes true"):
        next_fire_times("0 0 30 2 *", "UTC")


def test_an_unknown_time_zone_is_refused() -> None:
    with pytest.raises(InputError, match="'Mars/Olympus'"):
        next_fire_times("0 2 * * *", "Mars/Olympus")


def test_two_at_night_is_two_at_night_of_the_named_zone() -> None:
    zone = ZoneInfo("Asia/Tokyo")
    times = [time.astimezone(zone) for time in next_fire_times("0 2 * * *", "Asia/Tokyo")]
    assert [(time.hour, time.minute) for time in times] == [(2, 0)] * 3
    assert times[0] > datetime.now(zone)


def test_the_machines_own_time_zone_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Australia/Sydney")
    assert local_timezone() == "Australia/Sydney"
    monkeypatch.delenv("TZ")
    assert ZoneInfo(local_timezone())


@pytest.mark.parametrize(
    ("cron", "timezone", "named"),
    [("every night", "UTC", "every night"), ("0 2 * * *", "Mars/Olympus", "Mars/Olympus")],
)
def test_nothing_starts_on_wrong_input(
    cron: str, timezone: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr(module, "up", lambda: started.append("server"))
    monkeypatch.setattr(module, "lasting_api", lambda: started.append("server"))
    with pytest.raises(InputError, match=named):
        schedule(Settings(), "nightly", cron, timezone)
    assert not started


SMALL_FLOW = """
import logging, pathlib, sys, time
from prefect import flow
from tasks.config import Settings, TrackingSettings, load_settings

@flow(name="small")
def small(settings: Settings) -> int:
    logging.getLogger("tasks.small").warning("rank %d", settings.train.rank)
    if settings.name:
        pathlib.Path(settings.name).touch()
        time.sleep(60)
    return settings.train.rank
"""

SERVE = """
import importlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from flows.prefect_environment import prepare_prefect
prepare_prefect(quiet=False)
from flows import deploy
from tasks.config import load_settings
if __name__ == "__main__":
    api_url, module, name, *overrides = sys.argv[1:]
    flow = getattr(importlib.import_module(module), name)
    parameters = {"settings": load_settings(None, overrides).model_dump(mode="json", by_alias=True)}
    deploy.serve(flow, "nightly", "* * * * * */30", "UTC", parameters, api_url)
"""

Serve = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerState]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.delenv("PREFECT_API_URL", raising=False)
        yield up(free_port(47600))
        down()


@pytest.fixture
def serve(prefect: ServerState, tmp_path: Path) -> Iterator[Serve]:
    """Serve the small flow from a working directory that is not the checkout."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "small_flow.py").write_text(SMALL_FLOW, encoding="utf-8")
    (code / "serve_it.py").write_text(SERVE, encoding="utf-8")
    started: list[subprocess.Popen[str]] = []

    def start(*overrides: str) -> subprocess.Popen[str]:
        path = f"{code}{os.pathsep}{CHECKOUT}"
        process = subprocess.Popen(
            [sys.executable, str(code / "serve_it.py"), prefect.api_url, *overrides],
            env={**os.environ, "PYTHONPATH": path, "PREFECT_RUNNER_POLL_FREQUENCY": "1"},
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def small(tiny_model: ModelFolder, tmp_path: Path) -> list[str]:
    """Settings of a retraining that takes seconds, on thirty rows."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) + "\n" for n in range(30)))
    quick = ["train.num_layers=1", "train.max_steps=2", "evaluate.samples=0", "train.rank=3"]
    quick += ["evaluate.general_rows=0", "fuse.enabled=false"]
    return [f"model.source={tiny_model.path}", f"data.source={rows}", *quick]


def test_a_schedule_really_starts_retrainings_that_complete(
    prefect: ServerState, serve: Serve, small: list[str]
) -> None:
    server = serve("flows.retrain", "retrain", *small)
    # The next run is picked up ten seconds early: half a minute leaves time to stop between runs.
    run = wait_for(lambda: scheduled(prefect), 120, server)[0]
    assert run["parameters"]["settings"]["train"]["rank"] == 3
    assert run["auto_scheduled"]
    assert wait_for(lambda: "retrain: the rows are new" in " ".join(logs(prefect, run["id"])), 10, server)
    server.send_signal(signal.SIGINT)
    output, _ = server.communicate(timeout=30)
    assert server.returncode == 130, output
    assert "'nightly' is scheduled: * * * * * */30 (UTC)" in output
    assert prefect.url in output
    assert "Traceback" not in output, output


@pytest.mark.slow
def test_a_schedule_trains_then_rests_then_trains_again_after_a_row_is_added(
    prefect: ServerState, serve: Serve, small: list[str], tmp_path: Path
) -> None:
    already = len(scheduled(prefect))
    server = serve("flows.retrain", "retrain", *small)

    def told(count: int) -> list[str]:
        runs = wait_for(lambda: len(found := scheduled(prefect)) >= already + count and found, 240, server)
        return [run["state"]["message"] for run in runs[already:]]

    first, second = told(2)[:2]
    assert "version 1 is @challenger" in first or "version 1 is @champion" in first
    assert "unchanged since run" in second
    with (tmp_path / "rows.jsonl").open("a") as rows:
        rows.write(json.dumps({"prompt": "99?", "completion": "99!"}) + "\n")
    later = told(4)[2:]
    assert any("version 2" in message for message in later), later
    assert any("unchanged since run" in message for message in later[1:]), later
    server.send_signal(signal.SIGINT)
    server.communicate(timeout=30)
    client, _, experiment = connect(TrackingSettings())
    runs = client.search_runs([experiment], "attributes.status = 'FINISHED'")
    assert len(runs) == 2, "a run that had nothing to do leaves none in MLflow"
    assert all(run.data.tags["prefect.flow_run_id"] for run in runs)


@pytest.mark.slow
def test_a_run_killed_under_a_schedule_is_marked_in_prefect_and_mlflow(
    prefect: ServerState, serve: Serve, small: list[str]
) -> None:
    endless = ["train.max_steps=1000000", "train.epochs=1000000", "train.steps_per_eval=1000000"]
    server = serve("flows.retrain", "retrain", *small, *endless)
    client, _, experiment = connect(TrackingSettings())

    def at_work() -> Any:
        runs = client.search_runs([experiment])
        return next((run for run in runs if "train_loss" in run.data.metrics), None)

    run = wait_for(at_work, 180, server)
    os.kill(int(run.data.tags["tunesmith.process"].split()[-2]), signal.SIGKILL)
    wait_for(lambda: client.get_run(run.info.run_id).info.status == "KILLED", 120, server)
    server.send_signal(signal.SIGINT)
    server.communicate(timeout=60)
    assert "its process is gone" in client.get_run(run.info.run_id).data.tags["tunesmith.error"]
    assert flow_runs(prefect, "CRASHED")


@pytest.mark.slow
def test_sigterm_ends_the_schedule_with_143_and_leaves_no_run_behind(
    prefect: ServerState, serve: Serve, tmp_path: Path
) -> None:
    before = {run["id"] for run in flow_runs(prefect, "RUNNING")}  # the test above kills a run with its flow
    sign = tmp_path / "running"
    server = serve("small_flow", "small", f"name={sign}")
    wait_for(sign.exists, 120, server)
    children = psutil.Process(server.pid).children(recursive=True)
    assert children
    server.terminate()
    output, _ = server.communicate(timeout=30)
    assert server.returncode == 143, output
    assert "Traceback" not in output, output
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    assert {run["id"] for run in flow_runs(prefect, "RUNNING")} <= before


@pytest.mark.slow
def test_a_worker_carries_a_deployment_out(
    prefect: ServerState, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_pool, "lasting_api", lambda: prefect.api_url)
    deployed = work_pool.deploy(load_settings(None, small), "by-hand", "hands")
    environment = {**os.environ, "PREFECT_API_URL": prefect.api_url}
    command = [sys.executable, "-m", "prefect", "deployment", "run", deployed.name]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    worker = subprocess.run(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", "hands", "--run-once"],
        env=environment,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=240,
    )
    told = worker.stdout + worker.stderr
    assert worker.returncode == 0, told
    [run] = [run for run in flow_runs(prefect, "COMPLETED") if run["work_pool_name"] == "hands"]
    assert "version 1 is @ch" in run["state"]["message"], told
    assert "retrain: the rows are new" in " ".join(logs(prefect, run["id"]))


def wait_for(what: Callable[[], Any], limit_s: float, server: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and server.poll() is None:
        if found := what():
            return found
        time.sleep(0.2)
    server.kill()
    raise AssertionError(f"not within {limit_s:g} s: {server.communicate()[0]}")


def flow_runs(prefect: ServerState, state: str) -> list[dict[str, Any]]:
    wanted = {"flow_runs": {"state": {"type": {"any_": [state]}}}}
    found: list[dict[str, Any]] = httpx.post(f"{prefect.api_url}/flow_runs/filter", json=wanted).json()
    return found


def scheduled(prefect: ServerState) -> list[dict[str, Any]]:
    """The runs that a schedule has started and that are done, the oldest first."""
    runs = [run for run in flow_runs(prefect, "COMPLETED") if run["auto_scheduled"]]
    return sorted(runs, key=lambda run: str(run["start_time"]))


def logs(prefect: ServerState, flow_run: str) -> list[str]:
    wanted = {"logs": {"flow_run_id": {"any_": [flow_run]}}}
    return [line["message"] for line in httpx.post(f"{prefect.api_url}/logs/filter", json=wanted).json()]
