"""A measurement is made once for equal inputs, and no part of it again for what does not concern it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from sacrebleu import corpus_bleu

from tasks.config import DataSettings, EvaluateSettings, TrainSettings
from tasks.errors import InputError
from tasks.evaluate import generation, losses, measure
from tasks.evaluate.measure import EVALUATION_FILE, adapter_digest, answer_scores, last_exchange
from tasks.evaluate.measure import measure as measured
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.prepare.pipeline import prepare_data
from tasks.prepare.rows import SPLITS
from tasks.prepare.splits import load_splits
from tasks.publish import StepOutput
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, save_adapter
from tasks.train.loss import mean_loss


@pytest.fixture
def data(tiny_model: ModelFolder, tmp_path: Path) -> StepOutput:
    """Forty sums, some of them in three turns, and a text."""
    rows: list[dict[str, object]] = [
        {"prompt": f"{n}+{n}?", "completion": f"It is {2 * n}."} for n in range(40)
    ]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare_data(DataSettings(source=str(path), test_share=0.3), tiny_model)


def adapter(model: ModelFolder, folder: Path, seed: int) -> StepOutput:
    """A random adapter that changes what the model says."""
    network = load_model(model.path).model
    config = adapter_config(TrainSettings(num_layers=2, rank=4), 4)
    add_adapter(network, config, seed)
    weights = {
        name: mx.random.normal(array.shape, key=mx.random.key(seed + index)) * 0.3
        for index, (name, array) in enumerate(adapter_weights(network).items())
    }
    folder.mkdir()
    save_adapter(folder, weights, config)
    return StepOutput(folder, f"adapter-{seed}", False, 0.0)


def settings(**changes: object) -> EvaluateSettings:
    return EvaluateSettings.model_validate({"samples": 4, "max_tokens": 6, "general_rows": 3, **changes})


class Counts:
    """How often each kind of work was done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.losses = self.answers = self.loads = 0
        for module, name, kind in (
            (losses, "measure_losses", "losses"),
            (generation, "answer_prompts", "answers"),
            (measure, "_load", "loads"),
        ):
            monkeypatch.setattr(module, name, self._counting(getattr(module, name), kind))

    def _counting(self, function: object, kind: str) -> object:
        def counting(*arguments: object, **named: object) -> object:
            setattr(self, kind, getattr(self, kind) + 1)
            return function(*arguments, **named)  # type: ignore[operator]

        return counting

    def taken(self) -> tuple[int, int, int]:
        """Losses, answers and loads since the last call."""
        found = self.losses, self.answers, self.loads
        self.losses = self.answers = self.loads = 0
        return found


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


def test_figures_are_those_of_the_rows_and_of_the_answers(
    tiny_model: ModelFolder, data: StepOutput, tmp_path: Path
) -> None:
    tuned = adapter(tiny_model, tmp_path / "a", 1)
    figures = measured(settings(), tiny_model, tuned, data).read_json(EVALUATION_FILE)
    test = load_splits(data.path)["test"]
    network = load_model(tiny_model.path).model
    base = mean_loss(network, test, 8, "")
    assert len(figures["rows"]) == len(test)
    assert figures["test_loss"] != pytest.approx(base, rel=1e-3)
    plain = measured(settings(), tiny_model, None, data).read_json(EVALUATION_FILE)
    assert plain["test_loss"] == pytest.approx(base, rel=1e-6)
    assert len(plain["general"]["rows"]) == 3
    assert plain["general"]["texts"] == figures["general"]["texts"]
    answers = figures["answers"]
    assert len(answers) == 4
    assert figures["chrf"] == pytest.approx(sum(row["chrf"] for row in answers) / 4)
    assert figures["bleu"] == pytest.approx(
        corpus_bleu([row["answer"] for row in answers], [[row["reference"] for row in answers]]).score
    )
    assert figures["cut_off"] == sum(not row["finished"] for row in answers) / 4
    assert figures["answer_tokens"] == sum(row["tokens"] for row in answers) / 4


def test_the_base_is_measured_once_for_all_runs_on_the_same_rows(
    tiny_model: ModelFolder, data: StepOutput, tmp_path: Path, counts: Counts
) -> None:
    first, second = (adapter(tiny_model, tmp_path / str(seed), seed) for seed in (1, 2))
    for tuned, expected in ((first, (4, 2, 2)), (second, (2, 1, 1))):
        measured(settings(), tiny_model, None, data)
        measured(settings(), tiny_model, tuned, data)
        assert counts.taken() == expected


def test_an_adapter_is_known_by_its_contents_wherever_it_lies(
    tiny_model: ModelFolder, data: StepOutput, tmp_path: Path, counts: Counts
) -> None:
    tuned = adapter(tiny_model, tmp_path / "a", 1)
    shutil.copytree(tuned.path, tmp_path / "copy")
    assert adapter_digest(tmp_path / "copy") == adapter_digest(tuned.path)
    measured(settings(), tiny_model, tuned, data)
    assert counts.taken() == (2, 1, 1)
    assert measured(settings(), tiny_model, StepOutput(tmp_path / "copy", "else", False, 0.0), data).reused
    assert counts.taken() == (0, 0, 0)


def test_a_setting_repeats_only_what_it_concerns(
    tiny_model: ModelFolder, data: StepOutput, tmp_path: Path, counts: Counts
) -> None:
    (tmp_path / "mine.py").write_text("def long(answer, reference, prompt):\n    return len(answer)\n")

    def work(**changes: object) -> tuple[int, int, int]:
        measured(settings(**changes), tiny_model, None, data)
        return counts.taken()

    assert work() == (2, 1, 1)
    assert work() == (0, 0, 0)
    assert work(format="json") == (0, 0, 0)
    assert work(metrics=[f"{tmp_path}/mine.py:long"]) == (0, 0, 0)
    assert work(max_tokens=5) == (0, 1, 1)
    assert work(samples=3) == (0, 1, 1)
    assert work(general_rows=2) == (1, 0, 1)
    assert work(general_rows=0) == (0, 0, 0)
    assert work(batch_size=2) == (2, 1, 1)


def test_the_same_texts_are_measured_once_whatever_the_test_rows(
    tiny_model: ModelFolder, data: StepOutput, tmp_path: Path, counts: Counts
) -> None:
    measured(settings(samples=0), tiny_model, None, data)
    assert counts.taken() == (2, 0, 1)
    other = prepare_data(DataSettings(source=str(tmp_path / "sums.jsonl"), seed=3), tiny_model)
    measured(settings(samples=0), tiny_model, None, other)
    assert counts.taken() == (1, 0, 1)


def test_a_metric_of_ones_own_is_measured_anew_when_its_file_changes(
    tiny_model: ModelFolder, data: StepOutput, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    for value in (1, 2):
        file.write_text(f"def score(answer, reference, prompt):\n    return {value}\n")
        wanted = settings(metrics=[f"{file}:score"])
        figures = measured(wanted, tiny_model, None, data).read_json(EVALUATION_FILE)
        assert figures["score"] == figures["answers"][0]["score"] == value


def test_a_broken_metric_is_found_before_the_work(
    tiny_model: ModelFolder, data: StepOutput, tmp_path: Path, counts: Counts
) -> None:
    (tmp_path / "mine.py").write_text("def score(:\n")
    with pytest.raises(InputError, match="SyntaxError"):
        measured(settings(metrics=[f"{tmp_path}/mine.py:score"]), tiny_model, None, data)
    assert counts.taken() == (0, 0, 0)


def test_several_splits_are_measured_together(tiny_model: ModelFolder, data: StepOutput) -> None:
    whole = measured(settings(samples=100), tiny_model, None, data, SPLITS).read_json(EVALUATION_FILE)
    splits = load_splits(data.path)
    assert [row["tokens"] for row in whole["rows"]] == [
        int(count) for name in SPLITS for count in splits[name].supervised_counts
    ]
    assert len(whole["answers"]) == len(whole["rows"]) == 40
    network = load_model(tiny_model.path).model
    parts = [(mean_loss(network, splits[n], 8, ""), int(splits[n].supervised.sum())) for n in SPLITS]
    mean = sum(loss * count for loss, count in parts) / sum(count for _, count in parts)
    assert whole["test_loss"] == pytest.approx(mean, rel=1e-6)


def test_rows_without_a_question_or_an_answer_in_words_are_not_asked(
    tiny_model: ModelFolder, tmp_path: Path
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"Number {n} is a text."}) + "\n" for n in range(30)))
    texts = prepare_data(DataSettings(source=str(path)), tiny_model)
    figures = measured(settings(), tiny_model, None, texts).read_json(EVALUATION_FILE)
    assert "answers" not in figures
    assert figures["test_loss"] > 0
    tuned = adapter(tiny_model, tmp_path / "adapter", 1).path
    with pytest.raises(InputError, match="no row of valid asks and is answered in words"):
        answer_scores(settings(), tiny_model, tuned, texts, "valid")
    chat = {"messages": [{"role": role, "content": text} for role, text in zip(ROLES, "abcd", strict=True)]}
    assert last_exchange(chat) == ("c", "d")


ROLES = ("user", "assistant", "user", "assistant")
