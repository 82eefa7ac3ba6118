"""`tunesmith ab`: the answers of two runs to the same test prompts, compared blind, and what came of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from flows.find_run import ID_LENGTH, find_run
from tasks.config import JudgeSettings, TrackingSettings
from tasks.errors import InputError
from tasks.evaluate.blind import (
    LETTERS,
    Answers,
    Comparison,
    Contestant,
    compare,
    comparison_folder,
    other,
    write_key,
    write_whole,
)
from tasks.evaluate.blind_page import write_page
from tasks.evaluate.blind_tally import Tally, accept, tally
from tasks.evaluate.blind_verdicts import Verdicts, read_verdicts
from tasks.evaluate.judge import Judgement, ask_judge, check_judge
from tasks.publish import fingerprint
from tasks.tracking import read_text, reopened

log = logging.getLogger(__name__)

ANSWERS_TABLE = "evaluation.json"
"""The artifact of a run with a row a test prompt: prompt, reference, base, tuned."""

BASE = "base"
"""In place of a run: the base model of the other one."""


def make_comparison(
    first: str, second: str, tracking: TrackingSettings, seed: int, most: int | None
) -> Comparison:
    """Pair what two runs answered, or one run and its base model; the key is kept for the tally.

    Raises:
        InputError: a run is not found or has no answers, or they have no prompt in common.
    """
    if first == second:
        raise InputError(f"'{first}' is given twice: give two runs, or a run and '{BASE}'")
    if most is not None and most < 1:
        raise InputError(f"--prompts {most}: give 1 or more")
    runs = {name: find_run(name, tracking) for name in (first, second) if name != BASE}
    tables = {name: _table(run.id, run.name, tracking) for name, run in runs.items()}
    sides: list[tuple[Contestant, Answers]] = []
    for name in (first, second):
        if name == BASE:
            [of] = runs
            base = Contestant(None, f"base of {runs[of].name}", BASE)
            sides.append((base, tables[of][BASE]))
        else:
            run = runs[name]
            label = f"{run.name} ({run.id[:ID_LENGTH]})"
            sides.append((Contestant(run.id, label, run.id[:ID_LENGTH]), tables[name]["tuned"]))
    (a, answers_a), (b, answers_b) = sides
    if a.run_id == b.run_id:
        raise InputError(f"'{first}' and '{second}' are the same run, {a.name}; give two")
    comparison = compare(a, answers_a, b, answers_b, seed, most)
    if fewer := max(len(answers_a), len(answers_b)) - len(answers_a.keys() & answers_b.keys()):
        log.warning("%d prompts are left out: only one of the two answered them", fewer)
    write_key(comparison.key)
    return comparison


def make_page(comparison: Comparison, out: Path | None) -> Path:
    """Write the page to `out`, or beside the key; its path."""
    path = out or comparison_folder(comparison.key.comparison) / "blind.html"
    if path.is_dir() or path.suffix not in (".html", ".htm"):
        raise InputError(f"--out {path}: give a file name that ends in .html")
    write_page(comparison, path)
    return path


def tally_file(path: Path, tracking: TrackingSettings) -> Tally:
    """Count a file of verdicts together with those of other reviewers, and log the figures to both runs.

    A file that was tallied before changes nothing; a later one of the same reviewer takes its place.
    """
    verdicts = read_verdicts(path)
    counted = tally(verdicts.key, accept(verdicts))
    _log_figures(counted, tracking, "ab", {})
    return counted


def judge(
    comparison: Comparison, settings: JudgeSettings, tracking: TrackingSettings
) -> tuple[Judgement, Tally, Path]:
    """Have a model compare the answers; its opinions in full are kept in the file returned."""
    check_judge(settings)
    judgement = ask_judge(settings, comparison)
    name = fingerprint([settings.url, settings.model])
    path = comparison_folder(comparison.key.comparison) / f"judge-{name}.json"
    write_whole(path, judgement.as_json())
    counted = tally(comparison.key, [Verdicts(comparison.key, name, judgement.verdicts())])
    extra = {"failures": sum(judgement.failures.values()), "at_odds": judgement.at_odds}
    _log_figures(counted, tracking, "judge", extra)
    return judgement, counted, path


def _table(run_id: str, name: str, tracking: TrackingSettings) -> Mapping[str, Answers]:
    """What base and tuned model of a run answered, by prompt and reference."""
    text = read_text(tracking, run_id, ANSWERS_TABLE)
    if text is None:
        raise InputError(
            f"run {run_id} ({name}) has no {ANSWERS_TABLE}: it was not evaluated to the end, or with "
            "evaluate.samples=0; finetune again with more samples, which trains nothing anew"
        )
    table = json.loads(text)
    columns = table["columns"]
    places = {column: columns.index(column) for column in ("prompt", "reference", BASE, "tuned")}
    return {
        who: {(row[places["prompt"]], row[places["reference"]]): row[places[who]] for row in table["data"]}
        for who in (BASE, "tuned")
    }


def _log_figures(counted: Tally, tracking: TrackingSettings, kind: str, extra: Mapping[str, float]) -> None:
    """Metrics `ab/vs_<other>/…` on each run, once: the same figures again are not a second point."""
    key = counted.key
    tag = f"tunesmith.{kind}.{key.comparison}"
    for letter in LETTERS:
        run_id = key.contestant(letter).run_id
        if run_id is None:
            continue
        figures = {**counted.figures(letter), **extra}
        of = fingerprint(figures)
        with reopened(tracking, run_id) as run:
            if run.tag(tag) == of:
                continue
            against = key.contestant(other(letter)).tag
            run.report(sum(counted.wins.values()) + counted.ties, _named(f"{kind}/vs_{against}", figures))
            run.set_tags({tag: of})


def _named(prefix: str, figures: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in figures.items()}
