"""Any models on the same rows in one table, and runs beside each other: what differs, and what moved."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.cli import run
from flows.compare import best, compare_runs
from flows.evaluate import evaluate_targets
from flows.resume import SETTINGS_FILE, settings_as_yaml
from flows.targets import find_target
from tasks.config import Settings, TrackingSettings, load_settings
from tasks.errors import InputError
from tasks.evaluate.side_by_side import evaluate_adapter
from tasks.fuse.merge import fuse_adapter
from tasks.models.folder import ModelFolder
from tasks.models.resolve import resolve_model
from tasks.prepare.pipeline import prepare_data
from tasks.publish import StepOutput
from tasks.tracking import connect, mlflow_run
from tasks.train.step import train_adapter


@dataclass(frozen=True)
class Made:
    """Runs in a store of their own: two on the same data, a third on other data."""

    home: Path
    data: Path
    settings: Settings
    first: str
    second: str


@pytest.fixture(scope="module")
def made(tiny_model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Made:
    home = tmp_path_factory.mktemp("runs")
    data = rows_file(home / "sums.jsonl", range(40))
    with pytest.MonkeyPatch.context() as patch:
        at_home(patch, home)
        settings = given(tiny_model, data)
        first = finetuned("first", settings)
        second = finetuned("second", given(tiny_model, data, "train.rank=4"))
        finetuned("third", given(tiny_model, rows_file(home / "other.jsonl", range(50, 90))))
    return Made(home, data, settings, first, second)


@pytest.fixture
def runs(made: Made, monkeypatch: pytest.MonkeyPatch) -> Made:
    """The runs, in the store that commands look into."""
    at_home(monkeypatch, made.home)
    return made


def at_home(patch: pytest.MonkeyPatch, home: Path) -> None:
    patch.setenv("TUNESMITH_HOME", str(home))
    patch.setenv("TUNESMITH_CACHE", str(home / "cache"))


def rows_file(path: Path, numbers: range) -> Path:
    rows = [{"prompt": f"{n}+{n}?", "completion": f"It is {2 * n}."} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def given(model: ModelFolder, data: Path, *overrides: str) -> Settings:
    few = ["train.max_steps=2", "train.num_layers=2", "evaluate.samples=2", "evaluate.max_tokens=3"]
    few += ["data.test_share=0.3", "evaluate.general_rows=2", "train.learning_rate=1e-2"]
    return load_settings(None, [f"model.source={model.path}", f"data.source={data}", *few, *overrides])


def finetuned(name: str, settings: Settings) -> str:
    """The id of a run that prepared, trained and evaluated, as the flow does it."""
    with mlflow_run(settings, name, {}) as opened:
        opened.log_text(settings_as_yaml(settings), SETTINGS_FILE)
        model = resolve_model(settings.model)
        data = prepare_data(settings.data, model, opened)
        adapter = train_adapter(settings.train, model, data, opened)
        evaluate_adapter(settings.evaluate, model, adapter, data, opened, settings.train)
    return opened.id


def metrics_of(run_id: str) -> dict[str, float]:
    found: dict[str, float] = connect(TrackingSettings())[0].get_run(run_id).data.metrics
    return found


def test_runs_adapters_and_fused_models_stand_beside_their_base_in_one_table(
    runs: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    target = find_target("first")
    assert target.adapter
    data = prepare_data(runs.settings.data, target.model)
    adapter = StepOutput(target.adapter, "first", False, 0.0)
    fused = fuse_adapter(runs.settings.fuse, target.model, adapter, data)

    assert run(["evaluate", "first", runs.second, str(adapter.path), str(fused.path), "--json"]) == 0
    base, one, two, merged = json.loads(capsys.readouterr().out)
    assert base["against"] is None
    assert [line["against"] for line in (one, two, merged)] == [base["name"]] * 3
    assert "first" in one["name"]
    assert "second" in two["name"]
    for line, run_id in ((one, runs.first), (two, runs.second)):
        logged = metrics_of(run_id)
        assert line["figures"]["test_loss"] == logged["test/test_loss"]
        assert line["changes"]["test_loss"]["low"] == pytest.approx(logged["change/test_loss_low"])
        assert base["figures"]["test_loss"] == logged["base/test_loss"]
    assert merged["figures"]["test_loss"] == pytest.approx(one["figures"]["test_loss"], rel=1e-4)
    assert merged["changes"]["test_loss"]["change"] == pytest.approx(
        one["changes"]["test_loss"]["change"], abs=1e-3
    )

    assert run(["evaluate", "first", "evaluate.samples=3"]) == 0
    table = capsys.readouterr().out
    for what in ("test loss", "general texts", "chrF", "tiny", "first", "[", "95% interval"):
        assert what in table


def test_what_a_run_measured_is_not_measured_again(runs: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.models.load.load_model", None)
    assert len(evaluate_targets([runs.first], None)) == 2


def test_data_may_be_named_and_rows_that_were_trained_on_are_counted(
    runs: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepare_data(runs.settings.data, resolve_model(runs.settings.model))
    trained = prepared.read_json("report.json")["splits"]["train"]["rows"]
    fresh = rows_file(tmp_path / "fresh.jsonl", range(100, 130))
    _, tuned = evaluate_targets([runs.first], str(fresh), all_rows=True)
    assert (len(tuned.figures["rows"]), tuned.seen) == (30, 0)
    _, tuned = evaluate_targets([runs.first], str(fresh))
    assert len(tuned.figures["rows"]) < 30
    _, same = evaluate_targets([runs.first], None)
    assert same.seen == 0, "test rows are held out"
    assert run(["evaluate", runs.first, "--data", str(runs.data), "--all-rows"]) == 0
    assert f"was trained on {trained} of these rows" in " ".join(capsys.readouterr().out.split())


def test_a_model_with_no_data_and_runs_of_different_data_are_refused(
    runs: Made, tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="give --data"):
        evaluate_targets([str(tiny_model.path)], None)
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate_targets(["evaluate.samples=1"], None)
    words = [str(tiny_model.path), "evaluate.samples=1", "data.test_share=0.3"]
    [alone] = evaluate_targets(words, str(runs.data))
    assert len(alone.figures["answers"]) == 1
    assert run(["evaluate", "first", "third"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "data.source is" in told
    assert "give --data" in told


def test_compare_shows_the_settings_that_differ_and_the_figures_that_moved(
    runs: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", "first", runs.second[:12], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"] == {"train.rank": ["8", "4"]}
    assert told["same_data"] is True
    logged = [metrics_of(run_id)["test_loss"] for run_id in (runs.first, runs.second)]
    assert told["figures"]["test_loss"] == logged
    assert not any(name.startswith("base/") for name in told["figures"]), "the base is the same for both"
    assert next(iter(told["figures"])) == "best_val_loss"
    assert run(["compare", "first", "second"]) == 0
    table = capsys.readouterr().out
    for what in ("train.rank", "test_loss", "first", "second"):
        assert what in table
    assert "different data" not in table


def test_compare_says_so_when_the_data_differ_and_wants_two_runs(
    runs: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", "first", "third"]) == 0
    assert "different test rows" in " ".join(capsys.readouterr().out.split())
    assert compare_runs(["first", "third"]).same_data is False
    assert run(["compare", "first", runs.first[:10]]) == 2
    assert "at least two different" in capsys.readouterr().err
    assert run(["compare", "first", "none-such"]) == 2


def test_the_best_of_a_figure_follows_its_meaning() -> None:
    assert best("test/test_loss", [2.0, 1.0, None]) == 1.0
    assert best("test/chrf", [2.0, 1.0, None]) == 2.0
    assert best("trained_tokens", [2.0, 1.0]) is None
