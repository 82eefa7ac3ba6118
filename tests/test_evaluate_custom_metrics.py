"""Metrics of a person's own: called once an answer, and every fault named with its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.config import load_settings
from tasks.errors import InputError
from tasks.evaluate.custom_metrics import custom_scores, load_metrics


def metric_file(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text)
    return path


def test_a_function_scores_each_answer(tmp_path: Path) -> None:
    path = metric_file(
        tmp_path,
        "import re\nWORD = re.compile('[a-z]+')\n"
        "def shares_words(answer, reference, prompt):\n"
        "    return len(set(WORD.findall(answer)) & set(WORD.findall(reference)))\n"
        "def echoes(answer: str, reference: str, prompt: str) -> bool:\n    return answer == prompt\n",
    )
    metrics = load_metrics([f"{path}:shares_words", f"{path}:echoes"])
    assert custom_scores(metrics, "a cat", "the cat", "a cat") == {"shares_words": 1.0, "echoes": 1.0}


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("x = 1", "score", "mine.py: has no function 'score' .it has none."),
        ("def socre(a, r, p): return 1", "score", "it has socre"),
        ("import math\n\nmath.nothing", "score", "mine.py, line 3: AttributeError"),
        ("def score(:\n", "score", "mine.py, line 1: SyntaxError"),
        ("def chrf(a, r, p): return 1", "chrf", "there is a figure 'chrf' already; rename"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_metrics([f"{metric_file(tmp_path, text)}:{name}"])


def test_two_metrics_of_one_name_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    path = metric_file(tmp_path, "def score(a, r, p): return 1")
    with pytest.raises(InputError, match="there is a figure 'score' already"):
        load_metrics([f"{path}:score", f"{path}:score"])
    with pytest.raises(InputError, match=r"none\.py: no such file"):
        load_metrics([f"{tmp_path}/none.py:score"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    return {}['x']", r"mine\.py, line 2: score fails with KeyError: 'x'; the answer is 'An answer"),
        ("    return 'good'", r"mine\.py, line 1: score gives 'good' for the answer"),
        ("    return float('nan')", "gives nan .* it has to give a finite number"),
    ],
)
def test_a_function_that_fails_is_named_with_its_line_and_the_answer(
    tmp_path: Path, body: str, message: str
) -> None:
    path = metric_file(tmp_path, f"def score(answer, reference, prompt):\n{body}\n")
    with pytest.raises(InputError, match=message):
        custom_scores(load_metrics([f"{path}:score"]), "An answer", "", "")


def test_settings_take_a_file_and_a_function_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(None, ["evaluate.metrics=[mine.py:score]"])
    assert settings.evaluate.metrics == (f"{tmp_path}/mine.py:score",)
    for wrong in ("mine.py", "mine:score", "mine.py:"):
        with pytest.raises(InputError, match=r"path/to/file\.py:function"):
            load_settings(None, [f"evaluate.metrics=['{wrong}']"])


def test_settings_refuse_a_broken_pattern_and_choices_without_effect() -> None:
    with pytest.raises(InputError, match="neither 'json' nor a regular expression"):
        load_settings(None, ["evaluate.format='(unclosed'"])
    with pytest.raises(InputError, match="give a temperature above 0"):
        load_settings(None, ["evaluate.top_p=0.9"])
