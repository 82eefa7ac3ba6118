"""The report: what a page says, what is suggested from which evidence, and pages of runs made anew."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flows.cli import run as command
from flows.report import facts_of_run, report_runs
from tasks.config import Settings, TrackingSettings
from tasks.prepare.rows import FAULTS
from tasks.publish import write_json
from tasks.report.page import as_html, as_markdown, blocks, cell, loss_curve, size, summary, validation_curves
from tasks.report.progression import MOST_LINES, progression
from tasks.report.suggestions import suggestions
from tasks.report.write import FACTS_FILE
from tasks.tracking import Run, connect, mlflow_run


def facts(**changed: Any) -> dict[str, Any]:
    """Those of a run that leaves nothing to wish for."""
    return {
        "run": {"name": "sums", "id": "a1" * 16, "state": "FINISHED", "model": "tiny", "source": "sums"},
        "headline": [{"value": "3.000 → 2.000", "label": "validation loss, -33%"}],
        "registration": "sums version 1 is @champion: better",
        "data": {
            "facts": {"source": "sums.jsonl", "rows read": 4000},
            "splits": {"train": {"rows": 3200, "tokens": 9000, "supervised_tokens": 4000}},
        },
        "settings": {"train.rank": 16, "train.max_steps": 100, "name": None},
        "changed": ["train.rank"],
        "training": {"steps": 100, "planned_steps": 100, "ended_by": "", "advice": []},
        "progression": progression([(0, {"val_loss": 3.0}), (5, {"val_loss": 2.1}), (9, {"val_loss": 2.1})]),
        "history": {"train_loss": [(1, 3.0), (100, 2.0)], "val_loss": [(0, 3.0), (100, 2.1)]},
        "evaluation": {"lines": [line("test_loss")], "rows": 400, "answers": 8, "general": 0},
        "samples": {
            "The worst answers": [
                {"prompt": "1 | 1?", "reference": "2", "base": "a\nb", "tuned": "<b>2</b>"}
                | {"base_chrf": 3.0, "tuned_chrf": 99.0}
            ]
        },
        "steps": [{"name": "train", "reused": False, "seconds": 3.0, "why": "train.rank 8 → 16"}],
        "resources": {"peak memory (MLX)": "0.80 GB"},
        "files": [{"what": "adapter", "path": "/a/b", "bytes": 2_500_000}],
        "environment": {"device": "CPU", "memory": "16 GB"},
        "suggestions": ["Raise train.rank."],
        **changed,
    }  # fmt: skip


def line(name: str, better: bool | None = True, **changed: Any) -> dict[str, Any]:
    told = {"base": "3.00", "tuned": "2.00", "change": "-1.00 (-1.2 to -0.8)", "verdict": "better"}
    return {"name": name, "label": name, "better": better, **told, **changed}


class _Tags(HTMLParser):
    """Opened and closed tags, to hold that a page is well formed."""

    VOID = ("meta", "br", "path", "use", "rect", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_says_everything_needs_nothing_else_and_is_well_formed() -> None:
    page = as_html(facts())
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert all(link.startswith("#") for link in tags.links), "nothing is fetched"
    text = re.sub(r"<[^>]+>", " ", page)
    for told in (
        "3.000 → 2.000", "Raise train.rank.", "version 1 is @champion", "rows read", "3,200", "test_loss",
        "The worst answers", "train.rank 8 → 16", "0.80 GB", "2.5 MB", "device CPU",
    ):  # fmt: skip
        assert told in text
    assert "&lt;b&gt;2&lt;/b&gt;" in page, "what a model writes is text"
    assert '<tr class="best">' in page
    assert '<tr class="changed"><td>train.rank</td>' in page


def test_the_markdown_says_the_same_in_tables_that_hold() -> None:
    text = as_markdown(facts())
    for heading in (
        "Summary",
        "What to try next",
        "Loss",
        "Data",
        "Evaluation",
        "Steps",
        "Files",
        "Settings",
    ):
        assert f"\n## {heading}" in text
    assert "| 5 (best) |" in text
    assert "1 \\| 1?" in text
    assert "base: a b" in text
    columns = 0
    for row in text.splitlines():
        width = len(re.findall(r"(?<!\\)\|", row)) if row.startswith("|") else 0
        assert not (columns and width) or width == columns, row
        columns = width


def test_a_run_that_has_left_little_has_a_page_of_that() -> None:
    bare = {
        "run": {"name": "cut", "id": "b2" * 16, "state": "KILLED", "model": "", "source": ""},
        "changed": [],
    }
    for page in (as_html(bare), as_markdown(bare)):
        assert "The run is killed" in page
        assert "Evaluation" not in page
    assert loss_curve({}) == ""
    assert summary(bare) == ["The run is killed: this is what it has left so far."]


def test_progression_has_a_line_a_validation_with_the_mean_training_loss_before_it() -> None:
    history: list[tuple[int, dict[str, float]]] = [
        (0, {"val_loss": 4.0}),
        (1, {"train_loss": 3.0, "epoch": 0.5}),
        (2, {"train_loss": 5.0, "val_loss": 3.0, "epoch": 1.0, "learning_rate": 1e-3}),
    ]
    first, last = progression(history)
    assert (first["step"], first["train_loss"], first["change"]) == (0, None, None)
    assert (last["train_loss"], last["val_loss"], last["change"]) == (4.0, 3.0, -0.25)
    assert (last["epoch"], last["learning_rate"], last["best"]) == (1.0, 1e-3, True)
    assert progression([]) == []


def test_of_many_validations_the_first_the_best_and_the_last_stay() -> None:
    history = [(step, {"val_loss": abs(step - 137) + 1.0}) for step in range(300)]
    steps = [each["step"] for each in progression(history)]
    assert len(steps) <= MOST_LINES
    assert (steps[0], steps[-1]) == (0, 299)
    assert 137 in steps


BAD = next(iter(FAULTS))
GOOD_DATA = {
    "rows_read": 4000,
    "reasons": {"too_long": {"rows": 3000}},
    "guidance": {"advice": None},
    "splits": {"valid": {"rows": 400}},
}
LONG = {"seconds": 3600.0, "peak_memory": 2.0, "advice": []}
FALLING = progression([(0, {"val_loss": 3.0}), (50, {"val_loss": 2.5}), (100, {"val_loss": 2.2})])


def test_a_run_that_leaves_nothing_to_wish_for_is_told_nothing() -> None:
    assert suggestions(facts(), GOOD_DATA) == []
    assert suggestions({}, {}) == []


@pytest.mark.parametrize(
    ("changed", "data", "told"),
    [
        ({"evaluation": {"lines": [line("test_loss", None)]}}, {}, "may be chance"),
        ({"evaluation": {"lines": [line("test_loss", False)]}}, {}, "worse than the base model's"),
        ({"evaluation": {"lines": [line("test_loss"), line("general_loss", False)]}}, {}, "Forgetting"),
        ({"progression": FALLING}, {}, "raise train.max_steps"),
        ({"progression": FALLING, "settings": {}}, {}, "raise train.epochs"),
        ({"evaluation": {"lines": [line("cut_off", None, tuned="25%")]}}, {}, "25% of the answers"),
        ({}, {"guidance": {"advice": "40 training rows, less than the 50"}}, "40 training rows, less"),
        ({}, {"reasons": {BAD: {"rows": 900}}}, "900 of 4,000 rows are bad"),
        ({}, {"splits": {"valid": {"rows": 4}}}, "Only 4 validation rows"),
        ({"training": LONG}, {}, "Peak memory was 2.0 of 16 GB"),
        ({"training": {"advice": ["Plateau: …"]}}, {}, "Plateau"),
    ],
)  # fmt: skip
def test_each_piece_of_evidence_suggests_its_remedy(
    changed: dict[str, Any], data: dict[str, Any], told: str
) -> None:
    [found] = suggestions(facts(**changed), {**GOOD_DATA, **data})
    assert told in found


def test_figures_are_written_for_people() -> None:
    assert (size(999), size(2_500), size(2_500_000_000)) == ("999 bytes", "2.5 kB", "2.5 GB")
    assert blocks([3.0, 2.0, 1.0]) == "█▅▁"
    assert blocks([]) == ""
    assert cell("a\n|b") == "a \\|b"


def test_a_name_that_looks_like_a_formula_is_drawn() -> None:
    odd = facts(run={"name": "$x_{", "id": "c3" * 16, "state": "FINISHED"})
    assert "<svg" in validation_curves([odd])


@pytest.fixture
def ended(store: Path) -> list[Run]:
    """Two runs: one finished and with facts, one killed in mid-training."""
    with mlflow_run(Settings(), "whole", {"tunesmith.data": "d"}) as whole:
        whole.report(3, {"val_loss": 2.5, "best_val_loss": 2.5})
        kept = store.with_name(FACTS_FILE)
        write_json(
            kept,
            facts(run={"name": "whole", "id": whole.id, "state": "FINISHED", "model": "m", "source": "s"}),
        )
        whole.client.log_artifact(whole.id, str(kept), "report")
    runs = [whole]
    try:
        with mlflow_run(Settings(), "cut", {"tunesmith.data": "d"}) as cut:
            runs.append(cut)
            for step in range(4):
                cut.report(step, {"train_loss": 4.0 - step, "val_loss": 5.0 - step})
            cut.report(0, {"base/perplexity": 9.0, "test/perplexity": 7.0, "change/perplexity": -2.0})
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    return runs


def test_a_run_without_facts_is_told_from_its_record(ended: list[Run]) -> None:
    found = facts_of_run(TrackingSettings(), ended[1].id)
    assert found["run"]["state"] == "KILLED"
    assert [each["val_loss"] for each in found["progression"]] == [5.0, 4.0, 3.0, 2.0]
    [evaluated] = found["evaluation"]["lines"]
    assert (evaluated["base"], evaluated["tuned"], evaluated["change"]) == ("9", "7", "-2")
    assert f"tunesmith resume {ended[1].id[:8]}" in found["suggestions"][0]
    assert "<svg" in as_html(found)


def test_pages_of_several_runs_begin_with_one_that_compares_them(
    ended: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["report", "whole", ended[1].id[:8], "--out", str(tmp_path)]) == 0
    pages = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [page.suffix for page in pages] == [".html", ".md"] * 3
    assert all(page.parent == tmp_path for page in pages)
    compared = pages[0].read_text()
    assert "2 runs side by side" in compared
    assert compared.count("<svg") == 1
    assert "best_val_loss" in compared
    assert "3.000 → 2.000" in pages[2].read_text()


def test_one_run_named_twice_is_reported_once(ended: list[Run], home: Path) -> None:
    pages = report_runs(["whole", ended[0].id])
    assert [page.name for page in pages] == [f"{ended[0].id}.html", f"{ended[0].id}.md"]
    assert pages[0].parent == home / "reports"


@pytest.mark.usefixtures("store")
def test_a_run_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    connect(TrackingSettings())
    assert command(["report", "nothing"]) == 2
    assert "run 'nothing'" in capsys.readouterr().err
