"""The whole road on a tiny model, through Prefect, into MLflow; and again, reusing what has not changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from prefect.artifacts import Artifact

from flows.finetune import Outcome, finetune, run_name
from tasks.config import Settings, load_settings
from tasks.errors import StepError
from tasks.models.folder import ModelFolder

pytestmark = pytest.mark.usefixtures("prefect_harness")


@pytest.fixture
def settings(tiny_model: ModelFolder, tmp_path: Path) -> Settings:
    """A run of a few steps on 60 rows."""
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(60)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_settings(
        None,
        [
            f"model.source={tiny_model.path}",
            f"data.source={data}",
            "train.num_layers=2",
            "train.max_steps=8",
            "train.learning_rate=1e-2",
            "evaluate.samples=2",
            "evaluate.max_tokens=5",
        ],
    )


def change(settings: Settings, *overrides: str) -> Settings:
    given = settings.model_dump(mode="json", by_alias=True)
    for override in overrides:
        key, value = override.split("=")
        section, name = key.split(".")
        given[section][name] = value
    return Settings.model_validate(given)


def test_one_flow_leaves_a_complete_mlflow_run_an_adapter_and_a_report(settings: Settings) -> None:
    outcome = finetune(settings)
    finished = outcome.finished
    client = finished.run.client
    stored = client.get_run(finished.run.id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == run_name(settings) == "sums-layers2-rank8-lr0.01"
    assert stored.data.params["train.max_steps"] == "8"
    assert stored.data.tags["prefect.flow_run_id"]
    known = {"train_loss", "val_loss", "test_loss", "peak_memory", "base/perplexity", "test/perplexity"}
    assert known <= stored.data.metrics.keys()
    assert len(client.get_metric_history(finished.run.id, "train_loss")) == 8
    kept = {path.path for path in client.list_artifacts(finished.run.id)}
    assert {"adapter", "data", "evaluation.json", "report"} <= kept
    adapter = {path.path for path in client.list_artifacts(finished.run.id, "adapter")}
    assert {"adapter/adapters.safetensors", "adapter/adapter_config.json"} <= adapter
    page = outcome.report.read_text()
    assert "<svg" in page
    assert "change, 95% interval" in page
    assert "The worst answers" in page
    assert "What to try next" in page, "of 60 rows more are advised"
    assert outcome.report.with_suffix(".md").read_text().startswith(f"# {run_name(settings)}")
    assert "Test loss" in stored.data.tags["mlflow.note.content"]
    told = {path.path for path in client.list_artifacts(finished.run.id, "report")}
    assert "report/facts.json" in told
    artifact = Artifact.get("evaluation")
    assert artifact is not None
    assert "test loss" in str(artifact.data)
    link = Artifact.get("mlflow-run")
    assert link is not None
    assert f"/runs/{finished.run.id})" in str(link.data)
    assert str(link.flow_run_id) == stored.data.tags["prefect.flow_run_id"], "and the other way round"
    assert finished.reused() == []


def test_a_training_waits_for_its_turn_on_the_machine(
    settings: Settings, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(who: str, when_busy: str) -> None:
        assert when_busy == "refuse"
        raise StepError("run nightly is training on this machine")

    monkeypatch.setattr(sys.modules[finetune.__module__], "machine_turn", busy)
    with pytest.raises(StepError, match="run nightly"):
        finetune(change(settings, "flow.when_busy=refuse"))
    assert not (home / "steps" / "train").exists()


def test_fused_model_answers_as_base_and_adapter_do(settings: Settings) -> None:
    from mlx_lm import load

    finished = finetune(settings).finished
    assert finished.fused is not None
    fused, _ = load(str(finished.fused.path))
    adapted, _ = load(str(finished.model.path), adapter_path=str(finished.adapter.path))
    base, _ = load(str(finished.model.path))
    tokens = mx.array([[5, 60, 70, 80]])
    assert np.allclose(np.array(fused(tokens)), np.array(adapted(tokens)), atol=1e-5)
    assert not np.allclose(np.array(fused(tokens)), np.array(base(tokens)), atol=1e-3)


def reused(outcome: Outcome) -> set[str]:
    return set(outcome.finished.reused())


@pytest.mark.slow
def test_a_second_run_repeats_only_what_a_change_reaches(settings: Settings) -> None:
    first = finetune(settings)
    again = finetune(settings)
    assert reused(again) == {"prepare", "train", "evaluate", "fuse", "register"}
    points = again.finished.run.client.get_metric_history(again.finished.run.id, "train_loss")
    assert len(points) == 8, "a reused training brings its curve to the new run"
    assert first.finished.run.id != again.finished.run.id
    assert reused(finetune(change(settings, "evaluate.max_tokens=6"))) == {
        "prepare", "train", "fuse", "register",
    }  # fmt: skip
    forced = finetune(settings, force=("train",))
    assert reused(forced) == {"prepare"}
    stored = forced.finished.run.client.get_run(forced.finished.run.id)
    assert stored.data.tags["tunesmith.reused"] == "prepare"
    assert "train: --force; evaluate: --force" in stored.data.tags["tunesmith.made"]
    assert forced.finished.registration is not None
    assert forced.finished.registration.version == "2", "its weights may be others"
    artifact = Artifact.get("steps")
    assert artifact is not None
    assert "| prepare | reused |" in str(artifact.data)
    assert "| train | made |" in str(artifact.data)


def test_a_fused_model_that_is_not_the_adapter_is_not_published(
    settings: Settings, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.fuse import merge

    def forget_the_adapter(network: object) -> None:
        from mlx.utils import tree_unflatten

        named = network.named_modules()  # type: ignore[attr-defined]
        plain = [(name, layer.linear) for name, layer in named if hasattr(layer, "fuse")]
        network.update_modules(tree_unflatten(plain))  # type: ignore[attr-defined]

    monkeypatch.setattr(merge, "merge_layers", forget_the_adapter)
    with pytest.raises(StepError, match=r"over fuse\.tolerance"):
        finetune(settings)
    assert list((home / "steps" / "fuse").iterdir()) == []
