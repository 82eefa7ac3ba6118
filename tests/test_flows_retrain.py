"""Retraining: nothing changed ends at once, a changed row trains, and the better model is champion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client

from flows import retrain as module
from flows.retrain import LAST_LOOK, check_registry, plan_of, retrain, rows_fingerprint
from tasks.config import Settings, TrackingSettings, load_settings
from tasks.errors import InputError, StepError
from tasks.models.folder import ModelFolder
from tasks.register.champion import CHAMPION
from tasks.register.versions import registered_versions
from tasks.tracking import connect, mlflow_run, read_record


def write_rows(path: Path, count: int, answer: str = "It is {}.") -> None:
    rows = [{"prompt": f"{n} plus {n}?", "completion": answer.format(2 * n)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def settings(tiny_model: ModelFolder, tmp_path: Path) -> Settings:
    write_rows(tmp_path / "rows.jsonl", 40)
    return load_settings(
        None,
        [
            f"model.source={tiny_model.path}",
            f"data.source={tmp_path / 'rows.jsonl'}",
            "train.num_layers=2",
            "train.max_steps=6",
            "train.learning_rate=1e-2",
            "evaluate.samples=0",
            "evaluate.general_rows=0",
            "fuse.enabled=false",
        ],
    )


def runs() -> list[Any]:
    client, _, experiment = connect(TrackingSettings())
    return list(client.search_runs([experiment]))


def last_message() -> str:
    """What Prefect shows beside the state of the newest retraining."""
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        [newest] = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["retrain"])),
            sort=FlowRunSort.START_TIME_DESC,
            limit=1,
        )
    return str(newest.state and newest.state.message)


@pytest.mark.usefixtures("prefect_harness")
def test_unchanged_ends_at_once_and_changed_rows_train_and_are_judged(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = retrain(settings)
    assert first.trained
    assert first.promoted, first.reason
    assert "@champion" in first.reason
    assert read_record(TrackingSettings(), first.run_id).tags["prefect.flow_run_id"]

    with monkeypatch.context() as patch:
        patch.setattr(module, "finetune", lambda *_: pytest.fail("there was nothing to do"))
        second = retrain(settings.model_copy(update={"name": "another name"}))
    assert (second.run_id, second.trained, second.promoted) == (first.run_id, False, None)
    assert "unchanged since run" in second.reason
    assert last_message() == second.reason
    assert len(runs()) == 1
    assert LAST_LOOK in read_record(TrackingSettings(), first.run_id).tags

    write_rows(Path(settings.data.source), 41)
    third = retrain(settings)
    assert third.trained
    assert third.run_id != first.run_id
    versions = registered_versions(TrackingSettings())
    champion = next(version for version in versions if CHAMPION in version.aliases)
    assert (champion.run_id == third.run_id) == third.promoted
    assert "test_loss" in third.reason, "the figures of both are told"
    assert last_message() == third.reason
    kept = Artifact.get("retrain")
    assert kept is not None
    assert third.run_id in str(kept.data)


def test_a_retraining_that_failed_is_tried_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Settings] = []

    def fail(given: Settings) -> None:
        tried.append(given)
        with mlflow_run(given, "a run", {}):
            raise StepError("the disk is full")

    monkeypatch.setattr(module, "finetune", fail)
    for _ in range(2):
        with pytest.raises(StepError, match="the disk is full"):
            retrain.fn(settings)
    assert len(tried) == 2
    assert (tried[0].name or "").startswith("rows-layers2-rank8-lr0.01 20"), "nights are told apart by name"


def test_rows_are_known_by_their_contents(settings: Settings) -> None:
    before = rows_fingerprint(settings)
    Path(settings.data.source).touch()
    assert rows_fingerprint(settings) == before
    write_rows(Path(settings.data.source), 40, "It's {}.")
    assert rows_fingerprint(settings) != before


@pytest.mark.parametrize(
    ("override", "a_reason"),
    [
        ("train.rank=2", True),
        ("model.revision=other", True),
        ("register.metric=chrf", True),
        ("name=other", False),
        ("search.trials=2", False),
        ("tracking.experiment=other", False),
    ],
)
def test_settings_that_play_no_part_are_no_reason(override: str, a_reason: bool) -> None:
    assert (plan_of(load_settings(None, [override])) != plan_of(Settings())) == a_reason


def test_without_a_registry_nothing_could_be_promoted() -> None:
    with pytest.raises(InputError, match=r"register\.enabled"):
        check_registry(load_settings(None, ["register.enabled=false"]))
