"""The data report as people meet it: complete, self-contained, and deaf to what hostile rows ask for."""

from __future__ import annotations

import html
import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from data_reports import HOSTILE, sample_report, write_prepared
from prefect import flow

from tasks.config import DataSettings, Settings
from tasks.models.folder import ModelFolder
from tasks.prepare import pipeline
from tasks.prepare.page import length_chart, place, printable, report_markdown, shortened, write_page
from tasks.prepare.task import prepare
from tasks.publish import StepOutput
from tasks.tracking import Run, mlflow_run


class Page(HTMLParser):
    """The tags of a page with their attributes, its text, and the text that is marked."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.marked: list[str] = []
        self._in_mark = False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_mark = tag == "mark"

    def handle_endtag(self, tag: str) -> None:
        self._in_mark = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_mark:
            self.marked.append(data)


@pytest.fixture
def page(tmp_path: Path) -> Page:
    write_page(sample_report(), tmp_path / "report.html")
    return Page(tmp_path / "report.html")


def test_the_page_fetches_nothing_and_runs_nothing(page: Page) -> None:
    assert not re.search(r"https?:|//|url\(|@import", page.source.replace("(//evil)", ""))
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "a"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & attributes.keys()]


def test_text_of_rows_is_shown_and_never_read_as_markup(page: Page) -> None:
    assert "<script>" not in page.source
    assert page.text.count("<script>alert(1)</script>") == 6
    assert "[bold]loud[/bold] ␛[31mred␇" in page.text
    assert not set("\x1b\x07\u202e") & set(page.source)


def test_a_page_can_be_written_whatever_names_and_details_hold(tmp_path: Path) -> None:
    report = sample_report() | {"source": HOSTILE, "template": HOSTILE, "split_by": HOSTILE}
    report["formats"] = {HOSTILE: 960}
    report["guidance"]["advice"] = HOSTILE
    write_page(report, tmp_path / "report.html")
    assert "<script>" not in Page(tmp_path / "report.html").source


def test_the_page_gives_the_account_and_every_figure(page: Page) -> None:
    text = " ".join(page.text.split())
    assert "1,000 read = 960 used + 12 duplicates + 28 rejected" in text
    for figure in ("91,014", "40,294", "73,120", "44%", "prompt+completion", "median 186", "up to 470.5"):
        assert figure in text
    assert "3 held-out rows ask what a training row asks too" in text
    assert "4 rows were cut to fit" in text
    assert "768 training rows will do for a task" in text
    for reason in sample_report()["reasons"].values():
        assert reason["meaning"] in text
    assert "b.jsonl, line 17" in text
    assert "and 14 more" in text
    assert "a byte order mark, taken off" in text


def test_what_is_learnt_is_marked_and_nothing_else(page: Page) -> None:
    learnt = [
        printable(text)
        for sample in sample_report()["samples"]
        for text, supervised in sample["pieces"]
        if supervised
    ]
    assert page.marked == ["Marked and underlined", *learnt]
    assert "underline" in re.findall(r"mark \{[^}]*\}", page.source)[0], "not by colour alone"


def test_light_dark_and_narrow_screens_are_provided_for(page: Page) -> None:
    assert "prefers-color-scheme: dark" in page.source
    assert 'name="viewport"' in page.source
    assert "@media (max-width" in page.source


def test_a_source_without_faults_says_that_every_row_is_used(tmp_path: Path) -> None:
    report = sample_report() | {"reasons": {}, "notes": {}, "duplicates": 0, "rejected": 0, "samples": []}
    write_page(report, tmp_path / "report.html")
    text = Page(tmp_path / "report.html").text
    assert "Every row is used" in text
    assert "Noted, harmless" not in text


def test_bars_stand_where_their_lengths_are_and_the_limit_on_the_same_axis() -> None:
    report = sample_report()
    report["length_tokens"] |= {
        "median": 50.0,
        "p95": 100.0,
        "histogram": {"edges": [0, 50, 100], "rows": [4, 1]},
    }
    report["max_seq_length"] = 200
    chart = length_chart(report)
    places = [(bar["left"], bar["width"], bar["height"]) for bar in chart["bars"]]
    assert places == [(0, 25, 100), (25, 25, 25)]
    assert chart["marks"] == {"median": 25, "p95": 50, "limit": 100}
    assert [tick["label"] for tick in chart["ticks"]] == ["0", "50", "100", "150", "200"]


def test_a_limit_that_would_squeeze_the_rows_is_said_in_words(tmp_path: Path) -> None:
    report = sample_report()
    report["max_seq_length"] = 2 * report["length_tokens"]["histogram"]["edges"][-1] + 1
    assert "limit" not in length_chart(report)["marks"]
    write_page(report, tmp_path / "report.html")
    assert "max_seq_length 1,921, far to the right" in Page(tmp_path / "report.html").text


@pytest.mark.parametrize("longest", [1, 3, 12, 900, 8192, 1_000_000])
def test_an_axis_has_two_to_six_round_ticks_within_it(longest: int) -> None:
    report = sample_report() | {"max_seq_length": longest}
    report["length_tokens"] |= {"median": 1.0, "p95": 1.0, "histogram": {"edges": [0, longest], "rows": [1]}}
    ticks = length_chart(report)["ticks"]
    assert 2 <= len(ticks) <= 6
    assert all(0 <= tick["left"] <= 100 for tick in ticks)


def test_characters_that_steer_are_made_visible_and_others_stay() -> None:
    assert printable("a\x1b[31m\x00\r\x7f\x9b\u202e\ud800") == "a␛[31m␀␍␡���"
    assert printable("tab\tand\nline, ünï, 日本, 👩‍🚀") == "tab\tand\nline, ünï, 日本, 👩‍🚀"


def test_a_place_names_the_file_only_where_there_are_several() -> None:
    assert place({"file": "", "line": 1234}) == "line 1,234"
    assert place({"file": "a.csv", "line": 2}) == "a.csv, line 2"
    assert place({"file": "notes.md", "line": 0}) == "notes.md"


def test_a_shortened_text_is_never_longer_than_said() -> None:
    assert shortened("ten letters", 11) == "ten letters"
    assert shortened("ten letters", 5) == "ten…"


def test_markdown_gives_the_account_and_is_deaf_to_rows() -> None:
    markdown = report_markdown(sample_report())
    assert "1,000 rows read = 960 used + 12 duplicates + 28 rejected" in markdown
    assert "| train | 768 | 73,120 | 44% |" in markdown
    assert "| broken JSON | 7 | line 17: not JSON at column 31" in markdown
    assert "<" not in markdown
    assert not re.search(r"(?<!\\)!(?<!\\)\[", markdown), "no picture is fetched"
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {4, 5}, "no row opens a column"


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StepOutput:
    """Prepared data, which the step then gives instead of preparing any."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    write_prepared(folder)
    output = StepOutput(folder, "0123456789abcdef", False, 0.1)
    monkeypatch.setattr("tasks.prepare.task.prepare_data", lambda data, model, run: output)
    return output


MODEL = ModelFolder(Path("nowhere"), "none", "0", "none")


@pytest.mark.usefixtures("prefect_harness")
def test_a_flow_leaves_the_report_in_prefect(prepared: StepOutput) -> None:
    from prefect.artifacts import Artifact

    flow_runs = []

    @flow
    def preparing() -> StepOutput:
        import prefect.runtime.flow_run

        flow_runs.append(prefect.runtime.flow_run.get_id())
        return prepare(DataSettings(), MODEL, Run("1", "sqlite://", "1"))

    assert preparing() == prepared
    stored = Artifact.get("data-report")
    assert stored is not None
    assert stored.type == "markdown"
    assert str(stored.flow_run_id) == flow_runs[0]
    assert stored.task_run_id is not None
    assert stored.data == report_markdown(sample_report())


@pytest.mark.usefixtures("prefect_harness")
def test_a_report_that_prefect_does_not_take_costs_a_warning_and_not_the_run(
    prepared: StepOutput, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("server has gone")

    monkeypatch.setattr("tasks.prepare.task.create_markdown_artifact", refuse)

    @flow
    def preparing() -> StepOutput:
        return prepare(DataSettings(), MODEL, Run("1", "sqlite://", "1"))

    with caplog.at_level(logging.WARNING, logger="tasks.prepare"):
        assert preparing() == prepared
    assert "ConnectionError: server has gone" in caplog.text


def test_each_split_is_an_input_of_the_run_that_leads_to_its_rows(prepared: StepOutput) -> None:
    from mlflow.data import get_source

    report = sample_report()
    with mlflow_run(Settings(), "a run", {}) as run:
        run.log_dataset(prepared, report)
        run.log_dataset(prepared, report)
    with mlflow_run(Settings(), "another", {}) as other:
        other.log_dataset(prepared, report)
    for opened in (run, other):
        inputs = opened.client.get_run(opened.id).inputs.dataset_inputs
        by_context = {one.tags[0].value: one for one in inputs}
        assert len(inputs) == 3
        assert by_context.keys() == {"training", "validation", "test"}
        assert {one.dataset.name for one in inputs} == {"rows.jsonl"}
        assert all(one.dataset.digest.startswith(prepared.fingerprint) for one in inputs)
        train = by_context["training"].dataset
        assert json.loads(train.profile) == report["splits"]["train"]
        assert Path(get_source(train).uri) == prepared.path / "train.jsonl"


def test_what_prepare_data_reports_can_be_shown(tiny_model: ModelFolder, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"{n} + 1 <script>?", "completion": f"{n + 1}"} for n in range(60)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in [*pairs, pairs[0]]))
    output = pipeline.prepare_data(DataSettings(source=str(rows)), tiny_model)
    page = Page(output.path / "report.html")
    assert "61 read = 60 used + 1 duplicates + 0 rejected" in " ".join(page.text.split())
    assert all(re.fullmatch(r"\d+<\|im_end\|>", html.unescape(text)) for text in page.marked[1:])
    assert "1 | line 61: the same as line 1" in report_markdown(output.read_json("report.json"))
