"""@champion moves only to a version with a lower test loss on the same test rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.config import RegisterSettings, Settings
from tasks.evaluate.side_by_side import Evaluation
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput, write_json
from tasks.register.registry import Registration, register_adapter, registry_name
from tasks.tracking import mlflow_run

MODEL = ModelFolder(Path("model"), "tiny", "base-print", "tiny")


def register(
    folder: Path, adapter: str, loss: float, test_data: str = "rows", promote: str = "if-better"
) -> Registration:
    def output(name: str, test_loss: float) -> StepOutput:
        path = folder / f"{adapter}-{name}"
        path.mkdir(exist_ok=True)
        write_json(path / "evaluation.json", {"test_loss": test_loss})
        return StepOutput(path, adapter, False, 0.0)

    settings = RegisterSettings.model_validate({"promote": promote})
    evaluation = Evaluation(output("base", 3.0), output("tuned", loss), test_data)
    with mlflow_run(Settings(), adapter, {}) as run:
        return register_adapter(settings, "tiny/stdlib", MODEL, output("tuned", loss), evaluation, run)


def test_champion_follows_the_lowest_test_loss(tmp_path: Path) -> None:
    first = register(tmp_path, "a", 2.0)
    worse = register(tmp_path, "b", 2.5)
    better = register(tmp_path, "c", 1.5)
    assert (first.version, first.champion) == ("1", True)
    assert (worse.version, worse.champion) == ("2", False)
    assert worse.reason == "test loss 2.5000 is not below 2.0000 of version 1"
    assert (better.version, better.champion) == ("3", True)


def test_a_first_version_that_is_worse_than_the_base_is_no_champion(tmp_path: Path) -> None:
    told = register(tmp_path, "a", 3.5)
    assert not told.champion
    assert told.reason == "test loss 3.5000 is not below 3.0000 of the base model"


def test_figures_on_other_test_rows_are_not_compared(tmp_path: Path) -> None:
    register(tmp_path, "a", 2.0)
    told = register(tmp_path, "b", 1.0, test_data="other rows")
    assert not told.champion
    assert "other test rows" in told.reason


@pytest.mark.parametrize(("promote", "champion"), [("always", True), ("never", False)])
def test_the_policy_can_be_always_or_never(tmp_path: Path, promote: str, champion: bool) -> None:
    register(tmp_path, "a", 2.0)
    assert register(tmp_path, "b", 2.5, promote=promote).champion is champion


def test_the_same_adapter_is_one_version(tmp_path: Path) -> None:
    first, again = register(tmp_path, "a", 2.0), register(tmp_path, "a", 2.0)
    assert (first.reused, again.reused) == (False, True)
    assert first.version == again.version == "1"
    assert again.champion


def test_names_become_what_mlflow_allows() -> None:
    assert registry_name("org/model: v1") == "org-model-v1"
