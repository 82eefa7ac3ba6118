"""`tunesmith estimate`: a run's peak by its parts, from the command line."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from flows import estimating_tables
from flows.cli import run
from flows.estimating import Told
from flows.estimating_tables import print_estimate
from tasks.models.folder import ModelFolder
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
    assert {"training", "validation"} <= told["phases"].keys()


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
    told = Told(MemoryEstimate({"training": Breakdown(weights=1)}), 10**9, fits)
    print_estimate(screen, told)
    text = screen.export_text()
    assert all(each in text for each in expected)
    assert missing not in text
    assert [each["bits"] for each in told.plain()["fits"]] == [each.bits for each in fits]


def test_a_budget_that_is_none_is_refused(
    tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"model.source={tiny_model.path}", "train.budget=plenty"]
    assert run(["estimate", "flows/configs/quickstart.yaml", *settings]) == 2
    assert "8GB" in capsys.readouterr().err
