"""Base beside tuned: what changed is paired, what is told of it is true, and it is kept where people look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_evaluate_measure import adapter

from tasks.config import DataSettings, EvaluateSettings, Settings, TrackingSettings, TrainSettings
from tasks.evaluate.intervals import Interval
from tasks.evaluate.side_by_side import (
    answer_table,
    better,
    compared,
    evaluate_adapter,
    from_worst,
    worst_and_best,
)
from tasks.evaluate.summary import evaluation_lines, evaluation_markdown
from tasks.evaluate.text_metrics import bleu_counts, corpus_bleu, row_scores
from tasks.models.folder import ModelFolder
from tasks.prepare.pipeline import prepare_data
from tasks.publish import StepOutput
from tasks.report.page import _samples
from tasks.tracking import mlflow_run, read_text

REFERENCES = [f"Answer number {n} says that {n} plus {n} is {2 * n}." for n in range(30)]


def answers(texts: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"question {place}",
            "reference": reference,
            "answer": text,
            "tokens": 3,
            "seconds": 0.1,
            "finished": True,
            **row_scores(text, reference),
            "bleu_counts": bleu_counts(text, reference),
        }
        for place, (text, reference) in enumerate(zip(texts, REFERENCES, strict=True))
    ]


def figures(loss: float, texts: list[str], seed: int = 0) -> dict[str, Any]:
    noise = np.random.default_rng(seed).normal(0, 0.1, 30)
    rows = [{"nll": (loss + noise[n]) * (n + 5), "correct": n, "tokens": n + 5} for n in range(30)]
    general = {"texts": "t", "rows": rows[:10]}
    return {"test_loss": loss, "rows": rows, "general": general, "answers": answers(texts)}


def test_a_clear_gain_is_told_as_one_for_losses_and_for_scores() -> None:
    base, tuned = figures(3.0, ["Nothing."] * 30), figures(2.0, REFERENCES, seed=1)
    changes = compared(base, tuned, seed=0)
    assert changes["test_loss"].change == pytest.approx(-1, abs=0.1)
    for name in ("test_loss", "chrf", "rouge_l", "bleu", "exact_match"):
        assert changes[name].low <= changes[name].change <= changes[name].high
        assert better(name, changes[name]) is True, name
    assert better("token_accuracy", changes["token_accuracy"]) is None, "no change is no gain"
    back = compared(tuned, base, seed=0)
    assert better("chrf", back["chrf"]) is False
    assert better("test_loss", back["test_loss"]) is False


def test_bleu_is_compared_as_that_of_the_corpus() -> None:
    halves = [text if place % 2 else text[:20] for place, text in enumerate(REFERENCES)]
    base, tuned = figures(3.0, halves), figures(3.0, REFERENCES)
    whole = corpus_bleu(np.sum([row["bleu_counts"] for row in base["answers"]], axis=0))
    assert compared(base, tuned, 0)["bleu"].change == pytest.approx(100 - whole)


def test_what_has_other_rows_is_not_compared() -> None:
    base, tuned = figures(3.0, REFERENCES), figures(2.0, REFERENCES)
    tuned["general"] = {**tuned["general"], "texts": "others"}
    tuned["answers"] = [{**row, "prompt": "another"} for row in tuned["answers"]]
    assert compared(base, tuned, 0).keys() == {"test_loss", "token_accuracy"}
    del base["general"], base["answers"]
    assert compared(base, tuned, 0).keys() == {"test_loss", "token_accuracy"}


def test_lines_say_better_worse_or_may_be_chance_and_chrf_stands_before_bleu() -> None:
    measured = {
        "base": {"test_loss": 3.0, "chrf": 20.0, "bleu": 1.0, "empty": 0.5, "general_loss": 2.0, "mine": 1.0},
        "tuned": {
            "test_loss": 2.0,
            "chrf": 19.0,
            "bleu": 1.5,
            "empty": 0.1,
            "general_loss": 2.5,
            "mine": 2.0,
        },
    }
    changes = {
        "test_loss": Interval(-1.0, -1.2, -0.8),
        "chrf": Interval(-1.0, -3.0, 1.0),
        "empty": Interval(-0.4, -0.5, -0.3),
        "general_loss": Interval(0.5, 0.4, 0.6),
    }
    lines = {line.name: line for line in evaluation_lines(measured, changes)}
    assert list(lines) == ["test_loss", "general_loss", "chrf", "bleu", "empty", "mine"]
    assert [line.verdict for line in lines.values()] == ["better", "worse", "may be chance", "", "better", ""]
    assert lines["test_loss"].change == "-1.000 [-1.200, -0.800]"
    assert (lines["empty"].base, lines["empty"].change) == ("50.0%", "-40.0 [-50.0, -30.0]")


def test_the_worst_and_the_best_answers_are_found_and_none_twice() -> None:
    found = answers([text[: 5 + 3 * place] for place, text in enumerate(REFERENCES)])
    order = from_worst(found)
    scores = [found[place]["chrf"] for place in order]
    assert scores == sorted(scores)
    worst, best = worst_and_best(found)
    assert (worst, best) == (order[:5], order[-5:][::-1])
    few_worst, few_best = worst_and_best(found[:3])
    assert sorted(few_worst + few_best) == [0, 1, 2]
    assert worst_and_best([]) == ([], [])
    assert _samples([]) == {"The worst answers": [], "The best answers": []}
    table = answer_table(found, found)
    assert table["tuned"][0] == found[order[0]]["answer"]
    assert {"prompt", "reference", "base", "tuned", "base chrf", "tuned chrf"} <= table.keys()
    assert not {"tuned tokens", "tuned bleu_counts"} & table.keys()


@pytest.fixture
def data(tiny_model: ModelFolder, tmp_path: Path) -> StepOutput:
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{n}+{n}?", "completion": f"It is {2 * n}."} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare_data(DataSettings(source=str(path), test_share=0.3), tiny_model)


def test_both_sides_the_change_and_the_answers_are_in_mlflow(
    tiny_model: ModelFolder, data: StepOutput, tmp_path: Path
) -> None:
    wanted = EvaluateSettings(samples=3, max_tokens=4, general_rows=2)
    with mlflow_run(Settings(), "a run", {}) as run:
        tuned = adapter(tiny_model, tmp_path / "a", 1)
        evaluation = evaluate_adapter(wanted, tiny_model, tuned, data, run, TrainSettings())
    stored = run.client.get_run(run.id)
    metrics = stored.data.metrics
    for name in ("test_loss", "perplexity", "token_accuracy", "general_loss", "chrf", "bleu", "cut_off"):
        assert f"base/{name}" in metrics
        assert f"test/{name}" in metrics
    assert metrics["test_loss"] == metrics["test/test_loss"]
    change = metrics["test/test_loss"] - metrics["base/test_loss"]
    assert metrics["change/test_loss"] == pytest.approx(change)
    assert metrics["change/test_loss_low"] < metrics["change/test_loss"] < metrics["change/test_loss_high"]
    assert stored.data.tags["tunesmith.chrf"].startswith("nrefs:1|")
    table = json.loads(read_text(TrackingSettings(), run.id, "evaluation.json") or "")
    assert len(table["data"]) == 3
    assert {"prompt", "reference", "base", "tuned", "tuned chrf"} <= set(table["columns"])
    assert json.loads(stored.data.tags["mlflow.loggedArtifacts"])[0]["type"] == "table", "its UI shows it"
    markdown = evaluation_markdown(evaluation)
    assert "| test loss (nats a token) |" in markdown
    assert markdown.count("\n") == len(evaluation_lines(evaluation.figures(), evaluation.changes())) + 2
