"""A finetune that was killed goes on in its own MLflow run, and ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

import flows.finetune
from flows.cli import run
from flows.find_run import SHORTEST_ID
from flows.resume import SETTINGS_FILE, find_interrupted, settings_as_yaml
from tasks.config import Settings, TrackingSettings, load_settings
from tasks.errors import InputError, StepError
from tasks.home import CHECKOUT
from tasks.models.folder import ModelFolder
from tasks.prepare.splits import TokenRows, save_splits
from tasks.publish import StepOutput
from tasks.tracking import Run, connect, mlflow_run
from tasks.train.step import train_adapter
from tasks.train.task import train
from tasks.train.update import Launched, Updates


@pytest.fixture
def prepared(token_rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StepOutput:
    """Prepared data that the flow takes as it is, whatever `data.source` says."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    save_splits(folder, dict.fromkeys(("train", "valid", "test"), token_rows))
    (folder / "report.json").write_text(json.dumps({"source": "random rows"}))
    output = StepOutput(folder, "prepared", False, 0.0)
    monkeypatch.setattr(flows.finetune, "prepare", task(cache_policy=NO_CACHE)(lambda *_: output))
    return output


@pytest.fixture
def settings(tiny_model: ModelFolder, tmp_path: Path, prepared: StepOutput) -> Settings:
    """Twelve updates, a checkpoint every other one; nothing after evaluation."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1", "completion": "2"}\n')
    return load_settings(
        None,
        [
            f"model.source={tiny_model.path}",
            f"data.source={rows}",
            "train.num_layers=2",
            "train.epochs=3",
            "train.steps_per_eval=4",
            "train.steps_per_save=2",
            "evaluate.samples=0",
            "evaluate.general_rows=0",
            "fuse.enabled=false",
        ],
    )


@pytest.fixture
def config(settings: Settings, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(settings_as_yaml(settings))
    return path


KILLED_AT_7 = """
import os, signal, sys
from pathlib import Path
from flows.cli import main
import flows.finetune
from prefect import task
from prefect.cache_policies import NO_CACHE
from tasks.publish import StepOutput
from tasks.train.update import Updates

plain, number = Updates.launch, getattr(signal, sys.argv[1])

def launch(updates, batches, step):
    if step == 7:
        os.kill(os.getpid(), number)
    return plain(updates, batches, step)

Updates.launch = launch
prepared = StepOutput(Path(sys.argv[2]), "prepared", False, 0.0)
flows.finetune.prepare = task(cache_policy=NO_CACHE)(lambda *_: prepared)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C
sys.argv[1:] = ["finetune", sys.argv[3]]
main()
"""


def start_and_kill(config: Path, prepared: StepOutput, number: str) -> subprocess.CompletedProcess[str]:
    """`tunesmith finetune CONFIG`, which gets a signal in the middle of its seventh step."""
    from prefect.settings import PREFECT_API_URL

    return subprocess.run(
        [sys.executable, "-c", KILLED_AT_7, number, str(prepared.path), str(config)],
        cwd=CHECKOUT,
        env={**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value())},
        capture_output=True,
        text=True,
    )


def only_run() -> Any:
    client, _, experiment = connect(TrackingSettings())
    [stored] = client.search_runs([experiment])
    return stored


def adapter_digest(home: Path) -> str:
    [path] = home.glob("steps/train/*/adapters.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def curve(run_id: str, name: str) -> list[tuple[int, float]]:
    client, _, _ = connect(TrackingSettings())
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


@pytest.mark.usefixtures("prefect_harness")
@pytest.mark.parametrize(
    ("number", "code", "status", "saved"),
    [
        ("SIGKILL", -9, "RUNNING", "step-00000006"),
        pytest.param("SIGINT", 130, "KILLED", "step-00000007", marks=pytest.mark.slow),
        pytest.param("SIGTERM", 143, "KILLED", "step-00000007", marks=pytest.mark.slow),
    ],
)
def test_resume_completes_a_killed_run_as_if_it_had_never_been_killed(
    number: str,
    code: int,
    status: str,
    saved: str,
    settings: Settings,
    config: Path,
    prepared: StepOutput,
    home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = start_and_kill(config, prepared, number)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    killed = only_run()
    assert killed.info.status == status
    assert max(path.name for path in home.glob("checkpoints/*/step-*")) == saved

    assert run(["resume", killed.info.run_id[:8]]) == 0
    assert f"resuming at step {int(saved[-2:])} of 12" in capsys.readouterr().err
    finished = only_run()
    assert finished.info.run_id == killed.info.run_id
    assert finished.info.status == "FINISHED"
    assert "tunesmith.error" not in finished.data.tags
    resumed_losses = curve(finished.info.run_id, "train_loss")
    assert [step for step, _ in resumed_losses] == list(range(1, 13)), "no gap and no duplicate"
    assert [step for step, _ in curve(finished.info.run_id, "val_loss")] == [0, 4, 8, 12]
    assert not list(home.glob("checkpoints/*/*")), "a published adapter leaves no checkpoints"
    resumed = adapter_digest(home)

    shutil.rmtree(home / "steps")
    straight = flows.finetune.finetune(settings)
    assert adapter_digest(home) == resumed
    assert curve(straight.finished.run.id, "train_loss") == resumed_losses


@pytest.mark.usefixtures("prefect_harness")
def test_the_same_command_goes_on_too_in_a_new_run_with_the_whole_curve(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Updates.launch

    def launch(updates: Updates, batches: Any, step: int) -> Launched:
        if step == 7:
            raise KeyboardInterrupt
        return plain(updates, batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(Updates, "launch", launch)
        with pytest.raises(KeyboardInterrupt):
            flows.finetune.finetune(settings)
    outcome = flows.finetune.finetune(settings)
    assert [step for step, _ in curve(outcome.finished.run.id, "train_loss")] == list(range(1, 13))


def one_killed_run(settings: Settings, name: str) -> str:
    def work() -> None:
        with mlflow_run(settings, name, {}) as opened:
            opened.log_text(settings_as_yaml(settings), SETTINGS_FILE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    client, _, experiment = connect(TrackingSettings())
    newest: str = client.search_runs([experiment])[0].info.run_id
    return newest


def test_a_run_is_found_by_its_id_the_beginning_of_it_or_its_name(settings: Settings) -> None:
    first, second = one_killed_run(settings, "first"), one_killed_run(settings, "second")
    length = next(at for at, pair in enumerate(zip(first, second, strict=True), 1) if len(set(pair)) == 2)
    assert find_interrupted(first).run_id == first
    assert find_interrupted(second[: max(length, SHORTEST_ID)]).run_id == second
    assert find_interrupted("second").run_id == second
    assert find_interrupted("first").settings == settings


def test_of_runs_that_share_a_name_the_one_that_is_not_finished_is_meant(settings: Settings) -> None:
    with mlflow_run(settings, "nightly", {}):
        pass
    killed = one_killed_run(settings, "nightly")
    assert find_interrupted("nightly").run_id == killed


def test_a_run_that_cannot_be_meant_or_resumed_is_explained(settings: Settings) -> None:
    with pytest.raises(InputError, match="run 'none': no run of that id or name in sqlite:"):
        find_interrupted("none")
    with mlflow_run(settings, "whole", {}) as finished:
        pass
    with pytest.raises(InputError, match=f"run {finished.id} .whole. is finished"):
        find_interrupted("whole")
    one, other = one_killed_run(settings, "twin"), one_killed_run(settings, "twin")
    with pytest.raises(InputError, match=rf"any of 2: .*{other[:8]} \(twin, KILLED\).*more of the id"):
        find_interrupted("twin")
    with (
        mlflow_run(settings, "at work", {}),
        pytest.raises(InputError, match=rf"process {os.getpid()}; stop"),
    ):
        find_interrupted("at work")
    with mlflow_run(settings, "search", {}) as other_kind:
        pass
    other_kind.client.set_terminated(other_kind.id, "KILLED")
    with pytest.raises(InputError, match=r"has no settings\.yaml"):
        find_interrupted("search")
    assert one != other
    with pytest.raises(InputError, match="run '': no run"):
        find_interrupted("")


def test_a_run_at_work_on_another_machine_is_left_to_it(settings: Settings) -> None:
    with mlflow_run(settings, "far", {}) as opened:
        opened.set_tags({"tunesmith.process": "elsewhere 12 345.0"})
        with pytest.raises(InputError, match="running on elsewhere"):
            find_interrupted("far")


def test_wrong_references_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["resume", "nothing"]) == 2
    assert "run 'nothing'" in capsys.readouterr().err


def test_kept_settings_are_read_back_equal_without_credentials_and_with_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}\n")
    Path("stdlib").mkdir()
    given = load_settings(
        None, ["data.source=rows.jsonl", "tracking.uri=postgresql://me:secret@host/db", "search.rank=[4, 8]"]
    )
    text = settings_as_yaml(given)
    assert "secret" not in text
    Path("kept.yaml").write_text(text)
    kept = load_settings(Path("kept.yaml"))
    assert kept.data.source == str(tmp_path / "rows.jsonl")
    assert kept.tracking.uri == "postgresql://***@host/db"
    assert kept.train == given.train
    assert kept.search == given.search
    assert "source: stdlib\n" in settings_as_yaml(Settings()), "a name is no path, even beside such a folder"


def test_a_resumed_run_whose_data_has_changed_is_refused(
    settings: Settings, tiny_model: ModelFolder, prepared: StepOutput
) -> None:
    changed = StepOutput(prepared.path, "changed", False, 0.0)
    with mlflow_run(settings, "a run", {}) as opened:
        train_adapter(settings.train, tiny_model, prepared, opened)
    with (
        pytest.raises(InputError, match="has begun another training"),
        mlflow_run(settings, "a run", {}, resumed=opened.id) as again,
    ):
        train_adapter(settings.train, tiny_model, changed, again)


def test_how_often_a_run_is_saved_does_not_change_what_it_is(
    settings: Settings, tiny_model: ModelFolder, prepared: StepOutput
) -> None:
    other = {"steps_per_save": 5, "minutes_per_save": 1.0}
    with mlflow_run(settings, "a run", {}) as opened:
        first = train_adapter(settings.train, tiny_model, prepared, opened)
        again = train_adapter(settings.train.model_copy(update=other), tiny_model, prepared, opened)
    assert again.reused
    assert again.path == first.path


class Faults:
    """Makes the seventh update fail a number of times."""

    def __init__(self, error: Exception, times: int) -> None:
        self.plain, self.error, self.times = Updates.launch, error, times
        self.steps: list[int] = []

    def instead(self, updates: Updates, batches: Any, step: int) -> Launched:
        self.steps.append(step)
        if step == 7 and self.steps.count(7) <= self.times:
            raise self.error
        return self.plain(updates, batches, step)


@flow(validate_parameters=False)
def train_alone(settings: Settings, model: ModelFolder, data: StepOutput, run: Run) -> StepOutput:
    return train.with_options(retry_delay_seconds=0)(settings.train, model, data, run)


@pytest.mark.usefixtures("prefect_harness")
def test_a_retried_task_goes_on_from_its_checkpoint(
    settings: Settings, tiny_model: ModelFolder, prepared: StepOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(RuntimeError("the GPU timed out"), times=1)
    monkeypatch.setattr(Updates, "launch", lambda *given: faults.instead(*given))
    with mlflow_run(settings, "retried", {}) as opened:
        train_alone(settings, tiny_model, prepared, opened)
    assert faults.steps == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12]
    assert [step for step, _ in curve(opened.id, "train_loss")] == list(range(1, 13))


@pytest.mark.usefixtures("prefect_harness")
def test_a_loss_that_is_not_finite_is_not_retried(
    settings: Settings, tiny_model: ModelFolder, prepared: StepOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(StepError("step 7: loss nan"), times=9)
    monkeypatch.setattr(Updates, "launch", lambda *given: faults.instead(*given))
    with mlflow_run(settings, "diverged", {}) as opened, pytest.raises(StepError):
        train_alone(settings, tiny_model, prepared, opened)
    assert faults.steps == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.usefixtures("prefect_harness")
def test_advice_is_kept_with_the_adapter_and_shown_in_the_report(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tasks.train import health

    monkeypatch.setattr(health, "advice", lambda history: [f"Plateau after {len(history)} <points>"])
    outcome = flows.finetune.finetune(settings)
    told = outcome.finished.adapter.read_json("training.json")["advice"]
    assert told == ["Plateau after 13 <points>"]
    assert "Plateau after 13 &lt;points&gt;" in outcome.report.read_text()
    assert told[0] in caplog.text


def test_drafts_of_a_killed_training_are_removed_by_the_next(
    settings: Settings, tiny_model: ModelFolder, prepared: StepOutput, home: Path
) -> None:
    with mlflow_run(settings, "a run", {}) as opened:
        output = train_adapter(settings.train, tiny_model, prepared, opened)
        dead = output.path.with_name(f".{output.path.name}.0a1b2c3d.draft")
        other = output.path.with_name(".another.0a1b2c3d.draft")
        dead.mkdir()
        other.mkdir()
        train_adapter(settings.train, tiny_model, prepared, opened)
    assert not dead.exists()
    assert other.exists(), "its training may be at work"
