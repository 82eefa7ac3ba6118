"""Deployments for work pools, and what keeps a schedule alive: made, read back, and refused where wrong."""

from __future__ import annotations

import configparser
import plistlib
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from flows import work_pool
from flows.cli import run
from flows.install_hint import KEPT, launchd_plist, schedule_command, systemd_unit
from flows.work_pool import deploy
from tasks.config import Settings, load_settings
from tasks.errors import InputError
from tasks.home import CHECKOUT


@pytest.fixture
def api(prefect_harness: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The harness's server in the place of the local one."""
    from prefect.settings import PREFECT_API_URL

    url = str(PREFECT_API_URL.value())
    monkeypatch.setattr(work_pool, "lasting_api", lambda: url)
    return url


def test_a_deployment_names_the_flow_by_its_module_and_never_overlaps(api: str) -> None:
    settings = load_settings(None, ["train.rank=3"])
    first = deploy(settings, "nightly", "pool-a", "0 2 * * *", "Europe/Berlin")
    again = deploy(settings, "nightly", "pool-a")
    assert (first.made_pool, again.made_pool) == (True, False)
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name("retrain/nightly")
        assert client.read_work_pool("pool-a").type == "process"
    assert found.entrypoint == "flows.retrain.retrain"
    assert found.work_pool_name == "pool-a"
    assert Settings.model_validate(found.parameters["settings"]).train.rank == 3
    assert found.global_concurrency_limit is not None
    assert found.global_concurrency_limit.limit == 1


def test_a_pool_that_needs_an_image_is_refused(api: str) -> None:
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="pool-k", type="kubernetes"))
    with pytest.raises(InputError, match="--pool pool-k: is of type kubernetes"):
        deploy(Settings(), "nightly", "pool-k")


def test_a_wrong_schedule_is_refused_before_a_server_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_pool, "lasting_api", lambda: pytest.fail("a server was asked for"))
    with pytest.raises(InputError, match="cron 'nightly'"):
        deploy(Settings(), "nightly", "pool", "nightly")


def test_prefect_yaml_names_a_flow_that_exists_and_settings_that_are_allowed() -> None:
    from prefect.flows import load_flow_from_entrypoint

    written = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())
    for deployment in written["deployments"]:
        Settings.model_validate(deployment["parameters"]["settings"])
        path, _, name = deployment["entrypoint"].partition(":")
        flow = load_flow_from_entrypoint(f"{CHECKOUT / path}:{name}")
        assert flow.name == "retrain"
        assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


COMMAND = ["/a folder/python", "-m", "flows.cli", "schedule", "50%.yaml", 'name="$x"', "--cron", "0 2 * * *"]


def test_the_launchd_agent_runs_the_command_and_comes_back() -> None:
    agent = plistlib.loads(launchd_plist(COMMAND, "tunesmith.nightly").encode())
    assert agent["ProgramArguments"] == COMMAND
    assert agent["KeepAlive"]
    assert agent["RunAtLoad"]
    assert agent["EnvironmentVariables"]["PYTHONPATH"] == str(CHECKOUT)


def test_the_systemd_unit_runs_the_command_and_comes_back() -> None:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(systemd_unit(COMMAND, "nightly"))
    service = parser["Service"]
    words = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(service["ExecStart"])]
    assert words == COMMAND
    assert "%%" in service["ExecStart"]
    assert service["Restart"] == "always"


def test_a_service_is_given_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/db")
    monkeypatch.setenv("PREFECT_HOME", "/p")
    told = systemd_unit(COMMAND, "nightly")
    assert "secret" not in told
    assert "PREFECT_HOME=/p" in told
    assert "PREFECT_HOME" in KEPT


def test_the_hint_is_printed_and_nothing_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    config = tmp_path / "nightly.yaml"
    config.write_text("train: {rank: 4}\n")
    assert run(["schedule", str(config), "--cron", "0 2 * * *", "--install-hint"]) == 0
    told = capsys.readouterr().out
    assert "<key>ProgramArguments</key>" in told
    assert f"ExecStart={sys.executable} -m flows.cli schedule {config}" in told
    assert "tunesmith.nightly.plist" in told
    assert not (home / "server").exists()
    assert run(["schedule", str(config), "--cron", "nightly", "--install-hint"]) == 2


def test_the_command_of_a_schedule_is_good_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = schedule_command(Path("a.yaml"), ["train.rank=4"], "0 2 * * *", "UTC", "x")
    assert str(tmp_path / "a.yaml") in command
    assert command[-6:] == ["--cron", "0 2 * * *", "--timezone", "UTC", "--name", "x"]
