"""The comparison of searches: what is timed, how the rest follows from it, and its quick form."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tasks.models.folder import ModelFolder

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "search.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """Loaded by its path: it shares its name with a package."""
    specification = importlib.util.spec_from_file_location("benchmark_of_search", SCRIPT)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


TRIALS = [{"num_layers": layers} for layers in (8, 2, 16, 8, 2, 4, 16)]


def test_the_runs_timed_are_spread_over_the_layers(benchmark: ModuleType) -> None:
    assert benchmark.to_time(TRIALS, 5) == [1, 5, 0, 2, 4]


def test_runs_that_were_not_timed_follow_from_a_line_over_the_layers(benchmark: ModuleType) -> None:
    timed = {"1": 104.0, "0": 116.0, "2": 132.0}
    assert benchmark.all_seconds(TRIALS, timed) == pytest.approx([116, 104, 132, 116, 104, 108, 132])
    assert benchmark.all_seconds(TRIALS[:2], {"1": 5.0}) == [5.0, 5.0]


def test_the_figures_are_ratios_of_what_was_measured(benchmark: ModuleType) -> None:
    measured = {
        "trials": TRIALS,
        "timed": {"1": 100.0},
        "search_s": 70.0,
        "best_loss": 2.02,
        "best_exhaustive_loss": 2.0,
    }
    figures = benchmark.figures_of(measured)
    assert figures["speedup"] == 10.0
    assert figures["best_loss_ratio"] == 1.01
    assert (figures["trials"], figures["mlx_lm_runs_timed"]) == (7, 1)


def test_mlx_lm_is_given_the_trials_own_settings(benchmark: ModuleType, tmp_path: Path) -> None:
    trial = {"num_layers": 4, "rank": 16, "learning_rate": 1e-4, "steps": 99}
    search = {"model": "m", "data": "d", "epoch_steps": 33}
    theirs = benchmark.their_settings(search, trial, tmp_path)
    assert theirs["lora_parameters"] == {"rank": 16, "scale": 2.0, "dropout": 0.0}
    assert (theirs["iters"], theirs["steps_per_eval"], theirs["num_layers"]) == (99, 33, 4)


@pytest.mark.slow
def test_the_quick_form_ends_with_its_figures_and_goes_on_from_its_folder(
    tiny_model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    command = [sys.executable, str(SCRIPT), "--quick", "--model", str(tiny_model.path), "--timed", "2"]
    for _ in range(2):
        done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["name"] == "search"
        assert {"speedup", "best_loss_ratio", "trials"} <= told["figures"].keys()
        assert told["figures"]["trials"] == 6
        assert 0.5 < told["figures"]["best_loss_ratio"] < 2
