"""Metrics of a person's own: functions in a Python file of theirs, named in `evaluate.metrics`.

    def mentions_source(answer: str, reference: str, prompt: str) -> float:
        return float("source:" in answer)

is `evaluate.metrics=[metrics.py:mentions_source]`. It is called once an answer, its figure is the mean over
the answers, and higher is better. What it reads beside its own file is not known to the cache.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from tasks.errors import InputError
from tasks.publish import fingerprint

Metric = Callable[[str, str, str], float]
"""Of answer, reference and prompt."""

TAKEN = {
    "answer", "answer_tokens", "answers", "bleu", "bleu_counts", "chrf", "cut_off", "empty",
    "exact_match", "exact_match_normalised", "finished", "format_valid", "general", "general_loss",
    "latency_s", "perplexity", "prompt", "reference", "repetition", "rouge_l", "rows", "seconds",
    "test_loss", "token_accuracy", "tokens", "tokens_per_second",
}  # fmt: skip
"""Names that figures and columns of an evaluation have already."""


def load_metrics(named: Sequence[str]) -> dict[str, Metric]:
    """The functions by name; their files are run.

    Args:
        named: each `file.py:function`.

    Raises:
        InputError: a file is missing or fails, has no such function, or a name is taken.
    """
    metrics: dict[str, Metric] = {}
    for one in named:
        file, _, name = one.rpartition(":")
        if name in TAKEN or name in metrics:
            raise InputError(
                f"evaluate.metrics: {one}: there is a figure '{name}' already; rename the function"
            )
        metrics[name] = _function(Path(file), name)
    return metrics


def files_of(named: Sequence[str]) -> list[Path]:
    """The files of some metrics, whose contents decide what they measure."""
    files = [Path(one.rpartition(":")[0]) for one in named]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"evaluate.metrics: {missing[0]}: no such file; give path/to/file.py:function")
    return files


def custom_scores(
    metrics: Mapping[str, Metric], answer: str, reference: str, prompt: str
) -> dict[str, float]:
    """What the functions say of one answer.

    Raises:
        InputError: one fails, or gives no finite number.
    """
    scores = {}
    for name, metric in metrics.items():
        try:
            score = metric(answer, reference, prompt)
        except Exception as error:
            where = _where(metric, error)
            raise InputError(
                f"{where}: {name} fails with {type(error).__name__}: {error}; the answer is {answer[:80]!r}"
            ) from error
        if not isinstance(score, bool | int | float) or not math.isfinite(score):
            raise InputError(
                f"{_where(metric)}: {name} gives {score!r} for the answer {answer[:80]!r}; "
                "it has to give a finite number"
            )
        scores[name] = float(score)
    return scores


def _function(file: Path, name: str) -> Metric:
    [file] = files_of([f"{file}:{name}"])
    module = _module(file)
    function = getattr(module, name, None)
    if not callable(function):
        others = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(
            f"evaluate.metrics: {file}: has no function '{name}' (it has {', '.join(others) or 'none'})"
        )
    metric: Metric = function
    return metric


def _module(file: Path) -> ModuleType:
    name = f"tunesmith_metrics_{fingerprint(str(file))}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # of every .py file
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their annotations up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        line = error.lineno if isinstance(error, SyntaxError) else _line(error, str(file))
        raise InputError(
            f"evaluate.metrics: {file}, line {line}: {type(error).__name__}: {error}; "
            "the file has to run by itself"
        ) from error
    return module


def _where(metric: Metric, error: Exception | None = None) -> str:
    code = getattr(metric, "__code__", None)
    if code is None:
        return repr(metric)
    line = _line(error, code.co_filename) if error else code.co_firstlineno
    return f"{code.co_filename}, line {line or code.co_firstlineno}"


def _line(error: BaseException, file: str) -> int:
    """The last line of `file` that the error went through; 0 where it is not among them."""
    line, step = 0, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == file:
            line = step.tb_lineno
        step = step.tb_next
    return line
