"""`tunesmith estimate`: a run's peak by its parts, from the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows import estimating_tables
from flows.cli import run
from flows.estimating import Told
from flows.estimating_tables import print_estimate
from tasks.config import load_settings
from tasks.models.folder import ModelFolder
from tasks.prepare.pipeline import prepare_data
from tasks.train.memory.budget import plan_of
from tasks.train.memory.estimate import Breakdown, MemoryEstimate
from tasks.train.memory.fitting import Largest


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


@pytest.mark.parametrize(
    ("fits", "gpu", "expected", "missing"),
    [
        ([Largest("train.rank", None, 8, None)], False, ["as set", "8", "none", "float32"], "bits, as set"),
        (
            [Largest("train.rank", bits, 64 // bits, 128 // bits) for bits in (16, 8, 4)],
            True,
            ["16 bits, as set", "4 bits, with train.grad_checkpoint", "32"],
            "float32",
        ),
    ],
)
def test_what_fits_is_told_a_base_beside_the_other(
    fits: list[Largest], gpu: bool, expected: list[str], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimating_tables, "on_gpu", lambda: gpu)
    screen = Console(width=200, record=True, file=io.StringIO())
    told = Told(MemoryEstimate({"training": Breakdown(weights=1)}), 10**9, "prepared data", fits)
    print_estimate(screen, told)
    text = screen.export_text()
    assert all(each in text for each in [*expected, "rows: prepared data"])
    assert missing not in text
    assert [each["bits"] for each in told.plain()["fits"]] == [each.bits for each in fits]


def test_prepared_rows_are_told_of_and_nothing_is_prepared_for_it(
    tiny_model: ModelFolder, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{number}?", "completion": "a" * (20 * number)} for number in range(1, 13)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = [f"model.source={tiny_model.path}", f"data.source={source}", "train.num_layers=2"]
    settings = load_settings(None, given)

    def told(*more: str) -> dict[str, Any]:
        assert run(["estimate", "/dev/null", *given, *more, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    assert told()["rows"] == "512 tokens each, half supervised; the data is not prepared yet"
    assert not list(home.rglob("steps/prepare/*"))
    data = prepare_data(settings.data, tiny_model)
    plan = plan_of(settings.train, tiny_model, data)
    longest = max(plan.train.lengths.max(), plan.valid.lengths.max())
    assert told()["rows"] == f"prepared data, longest {longest} tokens"
    assert told()["peak_bytes"] == plan.estimate().peak_bytes
    assert told("--length", "65")["rows"] == "65 tokens each, half supervised; as given"
    assert told("data.seed=5")["rows"].startswith("512 tokens")
    assert len(list(home.rglob("steps/prepare/*"))) == 1


def test_a_budget_that_is_none_is_refused(
    tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"model.source={tiny_model.path}", "train.budget=plenty"]
    assert run(["estimate", "flows/configs/quickstart.yaml", *settings]) == 2
    assert "8GB" in capsys.readouterr().err
