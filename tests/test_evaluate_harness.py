"""The lm-evaluation-harness on base and tuned model, with tasks made here; most of it needs the extra."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import pytest

from flows.cli import run
from flows.resume import SETTINGS_FILE, settings_as_yaml
from tasks.config import Settings, TrackingSettings, TrainSettings
from tasks.errors import InputError, StepError
from tasks.evaluate.harness import SCORES_FILE, _flat, all_tasks, harness_scores
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.tracking import connect, mlflow_run
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, save_adapter

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'tunesmith[harness]'"
)

CHOICE = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: [" a", " b", " c"]
metric_list: [{{metric: acc}}]
"""

WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
generation_kwargs: {{until: ["x"], max_gen_toks: 8}}
doc_to_text: "{{{{question}}}}"
doc_to_target: "a"
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Twelve questions, asked as a choice and as a text."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"word {n}", "answer": n % 3}) + "\n" for n in range(12)))
    for name, text in (("letters", CHOICE), ("writing", WRITING)):
        (tmp_path / f"{name}.yaml").write_text(text.format(rows=rows))
    return [str(tmp_path / f"{name}.yaml") for name in ("letters", "writing")]


@pytest.fixture
def adapter(tiny_model: ModelFolder, tmp_path: Path) -> Path:
    """An adapter that changes what the model says."""
    network = load_model(tiny_model.path).model
    config = adapter_config(TrainSettings(num_layers=4), len(network.layers))
    add_adapter(network, config, seed=1)
    weights = {name: mx.random.normal(array.shape) for name, array in adapter_weights(network).items()}
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(folder, weights, config)
    return folder


def test_without_the_extra_it_is_named(tiny_model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'tunesmith\[harness\]'"):
        harness_scores(tiny_model, None, ["arc_easy"], None, None, 8)


def test_only_figures_become_metrics_and_a_filter_stays_in_the_name() -> None:
    results = {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 7},
        "gsm": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1},
    }
    assert _flat(results) == {
        "arc/acc": 0.5,
        "gsm/exact_match/strict-match": 0.25,
        "gsm/exact_match_stderr/strict-match": 0.1,
    }


@needs_harness
def test_the_base_scores_as_in_mlx_lms_own_evaluation(tiny_model: ModelFolder, tasks: list[str]) -> None:
    from lm_eval import simple_evaluate
    from mlx_lm.evaluate import MLXLM

    ours = harness_scores(tiny_model, None, tasks, None, None, 4).read_json(SCORES_FILE)
    plain = MLXLM(str(tiny_model.path), batch_size=4)
    found = simple_evaluate(
        plain, tasks=tasks, task_manager=all_tasks(), apply_chat_template=plain.use_chat_template
    )
    assert ours == _flat(found["results"])
    assert {"letters/acc", "letters/acc_stderr", "writing/exact_match"} <= ours.keys()


@needs_harness
def test_an_adapter_changes_the_scores_and_equal_inputs_are_measured_once(
    tiny_model: ModelFolder, adapter: Path, tasks: list[str]
) -> None:
    base = harness_scores(tiny_model, None, tasks[:1], None, None, 4)
    tuned = harness_scores(tiny_model, adapter, tasks[:1], None, None, 4)
    assert base.read_json(SCORES_FILE) != tuned.read_json(SCORES_FILE)
    assert harness_scores(tiny_model, adapter, tasks[:1], None, None, 4).reused
    assert not harness_scores(tiny_model, adapter, tasks[:1], 6, None, 4).reused


@needs_harness
def test_what_cannot_be_run_is_named(tiny_model: ModelFolder, tasks: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--tasks arc_eazy: not known"):
        harness_scores(tiny_model, None, ["arc_eazy"], None, None, 8)
    with pytest.raises(InputError, match=r"none\.yaml: no such file"):
        harness_scores(tiny_model, None, ["none.yaml"], None, None, 8)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(StepError, match="the lm-evaluation-harness failed"):
        harness_scores(tiny_model, None, tasks, None, None, 8)


@needs_harness
def test_the_scores_of_a_run_are_logged_to_it(
    tiny_model: ModelFolder, adapter: Path, tasks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings.model_validate({"model": {"source": str(tiny_model.path)}})
    with mlflow_run(settings, "a run", {}) as opened:
        opened.log_text(settings_as_yaml(settings), SETTINGS_FILE)
        opened.log_files(adapter, "adapter")
    assert run(["harness", "a run", "--tasks", *tasks, "--limit", "6"]) == 0
    assert "letters/acc" in capsys.readouterr().out
    found = connect(TrackingSettings())[0].get_run(opened.id).data.metrics
    assert {"harness/letters/acc", "harness/base/letters/acc", "harness/writing/exact_match"} <= found.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--tasks", "arc_easy"], "no run of that id or name"),
        (["none", "--tasks", "arc_easy", "--limit", "0"], "--limit 0"),
        (["none"], "--tasks"),
    ],
)
def test_wrong_input_is_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["harness", *arguments]) == 2
    assert message in capsys.readouterr().err
