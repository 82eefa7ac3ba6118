"""`tunesmith estimate`: a run's peak by its parts, from the command line."""

from __future__ import annotations

import json

import pytest

from flows.cli import run
from tasks.models.folder import ModelFolder


def test_the_estimate_of_a_model_folder_is_told_by_phases_and_parts(
    tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"model.source={tiny_model.path}", "train.num_layers=2"]
    config = "flows/configs/quickstart.yaml"
    assert run(["estimate", config, *settings, "--length", "65", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["peak_bytes"] == sum(told["phases"][told["phase"]].values())
    assert {"training", "validation", "answering", "fusing"} <= told["phases"].keys()
    assert told["over_afterwards"] == []


def test_what_takes_more_than_the_budget_after_the_training_is_said(
    tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"model.source={tiny_model.path}", "train.num_layers=2", "train.budget=0.1MB"]
    assert run(["estimate", "flows/configs/quickstart.yaml", *settings, "--length", "65"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "while answering, after the training: over the budget" in told
    assert "while fusing, after the training: over the budget" in told


def test_a_budget_that_is_none_is_refused(
    tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"model.source={tiny_model.path}", "train.budget=plenty"]
    assert run(["estimate", "flows/configs/quickstart.yaml", *settings]) == 2
    assert "8GB" in capsys.readouterr().err
