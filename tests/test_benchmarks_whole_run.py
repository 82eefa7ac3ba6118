"""The comparison of whole runs: what counts as overhead, that both do the same, and its quick form."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tasks.models.folder import ModelFolder

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import whole_run  # noqa: E402


def test_overhead_is_tracking_and_what_is_between_steps() -> None:
    apart = {"startup_s": 30.0, "training_s": 200.0, "work_s": 230.0, "tracking_s": 1.0, "between_s": 3.0}
    assert whole_run.overhead_share(apart) == 0.02


def test_tracking_within_a_step_is_not_the_steps_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    watch = whole_run._Watch()

    def pass_time(seconds: float) -> None:
        clock[0] += seconds

    track = watch._timed_tracking(lambda: pass_time(2))
    inner = watch._timed_step("train", lambda: pass_time(5))

    def train() -> None:
        pass_time(10)
        inner()
        track()

    pass_time(100)
    track()  # before any step: the flow's own
    watch._timed_step("train", train)()
    assert watch.seconds["train"] == 15
    assert watch.tracking_s == 2
    assert watch.first == 102


def test_only_what_a_package_takes_from_itself_is_timed() -> None:
    package = ModuleType("tasks.train")

    def of_itself() -> None: ...
    def of_another() -> None: ...

    of_itself.__module__, of_another.__module__ = "tasks.train.step", "tasks.publish"
    vars(package).update(of_itself=of_itself, of_another=of_another)
    whole_run._Watch().time_functions(package)
    assert package.of_itself is not of_itself
    assert package.of_another is of_another


def test_both_commands_get_the_same_work(tmp_path: Path) -> None:
    from tasks.config import Settings

    (tmp_path / "config.json").write_text('{"num_hidden_layers": 6}')
    ours = Settings.model_validate(whole_run._our_settings(tmp_path, rows=100, steps=30, epoch=10)).train
    theirs = whole_run._their_settings(tmp_path, tmp_path, tmp_path, steps=30, epoch=10)
    lora = {"rank": ours.rank, "scale": ours.scale, "dropout": ours.dropout}
    assert theirs["lora_parameters"] == lora
    assert theirs["num_layers"] == ours.num_layers == 6
    assert theirs["batch_size"] == ours.batch_size
    assert theirs["learning_rate"] == ours.learning_rate
    assert theirs["iters"] == ours.max_steps
    assert theirs["steps_per_eval"] == ours.steps_per_eval


@pytest.mark.slow
def test_the_quick_form_runs(tiny_model: ModelFolder) -> None:
    command = [sys.executable, str(BENCHMARKS / "whole_run.py"), "--quick", "--model", str(tiny_model.path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["name"] == "whole_run"
    assert line["figures"].keys() >= {"whole_run_ratio", "overhead_share", "startup_s"}
    assert all(figure > 0 for figure in line["figures"].values())
