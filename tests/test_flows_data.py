"""Data on the command line: the report reads well and safely, and a prepared folder is never lost."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_reports import HOSTILE, sample_report, write_prepared
from rich.console import Console

from flows import data
from flows.cli import app, run
from flows.data import (
    check_out,
    check_page,
    data_settings,
    finetune_command,
    prepare_command,
    publish_copy,
    put_back,
)
from flows.tables import print_data_report
from flows.verbs.frame import QUICKSTART
from tasks.config import DataSettings, load_settings
from tasks.errors import InputError, StepError
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput


def printed(report: dict[str, Any], width: int = 80, samples: int = 2, **console: Any) -> str:
    told = io.StringIO()
    print_data_report(Console(file=told, width=width, **console), report, 4, samples)
    return told.getvalue()


def test_a_report_says_what_was_read_what_is_used_and_what_an_epoch_costs() -> None:
    told = " ".join(printed(sample_report()).split())
    assert "1,000 rows read = 960 used + 12 duplicates + 28 rejected" in told
    assert "train 768 73,120 32,412 44%" in told
    assert "all 960 91,014 40,294 44%" in told
    assert "messages 500, prompt+completion 460" in told
    assert "median 186, 95% up to 470, longest 900 tokens; the limit is 1,024; 4 cut to fit" in told
    assert "192 steps at train.batch_size=4" in told
    assert "3 held-out rows ask what a training row asks" in told
    assert "768 training rows will do for a task" in told


@pytest.mark.parametrize(("rows", "steps"), [(768, "192"), (769, "193"), (1, "1")])
def test_an_epoch_counts_the_last_batch_that_is_not_full(rows: int, steps: str) -> None:
    report = sample_report()
    report["splits"]["train"]["rows"] = rows
    assert f"{steps} steps at train.batch_size=4" in printed(report)


def test_the_first_three_lines_of_every_reason_are_named_and_the_rest_counted() -> None:
    told = " ".join(printed(sample_report()).split())
    assert "not used: 7 rows, broken JSON line 17: not JSON at column 31" in told
    assert "line 25: not JSON" in told
    assert "line 29: not JSON" not in told
    assert "and 4 more" in told
    assert "b.jsonl, line 17: has <script>" in told
    assert "noted: a byte order mark, taken off (1: line 1)" in told


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert max(map(len, printed(sample_report(), width).splitlines())) <= width


@pytest.mark.parametrize("console", [{}, {"force_terminal": True, "color_system": "truecolor"}])
def test_what_rows_hold_does_not_steer_the_terminal(console: dict[str, Any]) -> None:
    report = sample_report()
    report["template"] = report["split_by"] = report["guidance"]["advice"] = HOSTILE
    report["formats"] = {HOSTILE: 960}
    told = printed(report, **console)
    assert "[bold]loud[/bold]" in told
    assert "␛[31mred␇" in told
    assert "\x1b[31m" not in told
    assert not set("\x07\u202e\ud83d") & set(told)


def test_what_is_learnt_is_in_colour_or_where_there_is_none_in_brackets() -> None:
    plain = printed(sample_report())
    assert "⟦Assur at first, then Nineveh." in plain
    assert "It fell in 612 BC.<|im_end|>⟧" in plain
    assert plain.count("⟦") == 2, "two samples"
    coloured = printed(sample_report(), force_terminal=True, color_system="truecolor")
    assert "\x1b[32mAssur at first, then Nineveh." in coloured
    assert "⟦" not in coloured
    uncoloured = printed(sample_report(), force_terminal=True, color_system="truecolor", no_color=True)
    assert "⟦Assur" in uncoloured
    assert "⟦" not in printed(sample_report(), samples=0)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "my rows.jsonl"
    pairs = ({"prompt": f"{n} + 1", "completion": str(n + 1)} for n in range(60))
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture
def stand_in(tmp_path: Path, tiny_model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> list[DataSettings]:
    """Preparation that writes a report of 1,000 rows, whatever it is given; the settings it was given."""
    given: list[DataSettings] = []

    def prepare_data(settings: DataSettings, model: ModelFolder, run: None = None) -> StepOutput:
        given.append(settings)
        folder = tmp_path / "steps" / str(len(given))
        folder.mkdir(parents=True)
        write_prepared(folder, sample_report() | {"source": f"preparation {len(given)}"})
        return StepOutput(folder, "f" * 16, False, 0.1)

    def inspect_data(settings: DataSettings, model: ModelFolder) -> dict[str, Any]:
        given.append(settings)
        return sample_report()

    monkeypatch.setattr("tasks.prepare.pipeline.prepare_data", prepare_data)
    monkeypatch.setattr("tasks.prepare.pipeline.inspect_data", inspect_data, raising=False)
    return given


Verb = Callable[..., tuple[int, str, str]]


@pytest.fixture
def verb(rows: Path, tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]) -> Verb:
    """Run a verb on the rows and the tiny model: exit code, standard output, standard error."""

    def call(name: str, *arguments: str) -> tuple[int, str, str]:
        code = run([name, str(rows), *arguments, "--model", str(tiny_model.path)])
        told = capsys.readouterr()
        return code, told.out, " ".join(told.err.split())

    return call


def test_inspect_prints_the_report_and_the_command_that_prepares(
    verb: Verb, stand_in: list[DataSettings], rows: Path, tiny_model: ModelFolder
) -> None:
    code, told, _ = verb("inspect", "data.max_rows=100", "train.batch_size=8")
    assert code == 0
    assert stand_in[0] == DataSettings(source=str(rows), max_rows=100)
    assert "96 steps at train.batch_size=8" in told
    assert told.count("⟦") == 2
    words = shlex.split(told.strip().splitlines()[-1])
    overrides = ["data.max_rows=100", "train.batch_size=8", "data.on_bad_row=skip"]
    assert words == ["next", "tunesmith", "prepare", str(rows), *overrides, "--model", str(tiny_model.path)]
    app.parse_args(words[2:], exit_on_error=False, print_error=False)


def test_json_is_the_report_and_nothing_else(verb: Verb, stand_in: list[DataSettings]) -> None:
    code, told, complaint = verb("inspect", "--json")
    assert (code, complaint) == (0, "")
    assert json.loads(told) == sample_report()
    assert told.isascii(), "control characters and halves of pairs are escaped"


def test_inspect_writes_the_page_where_it_is_told(
    verb: Verb, stand_in: list[DataSettings], tmp_path: Path
) -> None:
    code, _, _ = verb("inspect", "--html", str(tmp_path / "report.html"))
    assert code == 0
    assert "<h1>rows.jsonl</h1>" in (tmp_path / "report.html").read_text()


def test_inspect_does_not_write_a_page_over_data(
    verb: Verb, stand_in: list[DataSettings], rows: Path, tmp_path: Path
) -> None:
    before = rows.read_bytes()
    code, _, complaint = verb("inspect", "--html", str(rows))
    assert code == 2
    assert "give a name that ends in .html" in complaint
    assert rows.read_bytes() == before
    with pytest.raises(InputError, match="is no folder"):
        check_page(tmp_path / "none" / "report.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_page(tmp_path / "folder.html")
    assert stand_in == [], "nothing was done first"


def test_prepare_says_where_the_folder_lies(verb: Verb, stand_in: list[DataSettings], tmp_path: Path) -> None:
    code, told, _ = verb("prepare")
    assert code == 0
    assert f"prepared     {tmp_path / 'steps' / '1'}" in told
    assert "⟦" not in told


def test_the_finetune_named_next_trains_on_the_very_same_data(
    verb: Verb, stand_in: list[DataSettings]
) -> None:
    overrides = ["data.max_rows=50", 'data.system_prompt="be: brief"', "train.rank=4"]
    code, told, _ = verb("prepare", *overrides)
    assert code == 0
    words = shlex.split(told.strip().splitlines()[-1])[2:]
    assert words[0] == "finetune"
    app.parse_args(words, exit_on_error=False, print_error=False)
    settings = load_settings(Path(words[1]), words[2:])
    assert settings.data == stand_in[0]
    assert settings.train.rank == 4


def test_a_source_is_taken_as_it_is_written_whatever_yaml_would_make_of_it() -> None:
    for source in (
        "7",
        "yes",
        "a: b.jsonl",
        "[x].jsonl",
        "# rows.jsonl",
        "ünï 日本 🙂.jsonl",
        "x" * 300 + " y",
    ):
        assert data_settings(source, source, []).data.source == source
        assert data_settings(source, source, []).model.source == source
        settings = data_settings(source, None, ["data.seed=3"])
        words = shlex.split(finetune_command(settings, QUICKSTART, []))[3:]
        assert load_settings(QUICKSTART, words).data == settings.data
        clean: dict[str, Any] = {"reasons": {"duplicate": {}}}
        prepared = ["tunesmith", "prepare", source, "a=b c"]
        assert shlex.split(prepare_command(source, None, ["a=b c"], clean)) == prepared
        faulty: dict[str, Any] = {"reasons": {"json": {}}}
        skipping = [*prepared, "data.on_bad_row=skip"]
        assert shlex.split(prepare_command(source, None, ["a=b c"], faulty)) == skipping


def test_prepare_puts_a_whole_copy_in_place_of_an_earlier_one(
    verb: Verb, stand_in: list[DataSettings], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert verb("prepare", "--out", str(out))[0] == 0
    (out / ".DS_Store").write_text("of a file manager")
    code, told, _ = verb("prepare", "--out", str(out))
    assert code == 0
    assert f"prepared     {out}" in told
    assert json.loads((out / "report.json").read_text())["source"] == "preparation 2"
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "steps/2").iterdir()}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing is left beside it"


def test_a_folder_with_anything_of_somebody_elses_is_refused_before_work_begins(
    verb: Verb, stand_in: list[DataSettings], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_prepared(out)
    (out / "notes.txt").write_text("mine")
    code, _, complaint = verb("prepare", "--out", str(out))
    assert code == 2
    assert "holds 'notes.txt', which would be lost; give a new or empty folder" in complaint
    (out / "notes.txt").unlink()
    (out / "tokens.safetensors").unlink()
    with pytest.raises(InputError, match=r"without 'tokens\.safetensors' no prepared data"):
        check_out(out)
    with pytest.raises(InputError, match="is not a folder"):
        check_out(out / "train.jsonl")
    assert stand_in == []


def test_step_outputs_are_not_replaced_by_a_copy_of_others(home: Path) -> None:
    with pytest.raises(InputError, match="own step outputs"):
        check_out(home.resolve() / "steps" / "prepare" / "0123456789abcdef")


def prepared(folder: Path, mark: str) -> Path:
    folder.mkdir()
    write_prepared(folder, sample_report() | {"source": mark})
    return folder


def mark(folder: Path) -> str:
    return str(json.loads((folder / "report.json").read_text())["source"])


def test_a_copy_that_fails_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = prepared(tmp_path / "out", "old"), prepared(tmp_path / "new", "new")
    rename = Path.rename

    def full_disk(path: Path, target: Path) -> Path:
        if path.name.endswith(".draft"):
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(StepError, match="No space left on device; give another folder"):
        publish_copy(new, old)
    assert mark(old) == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "new"}


def test_a_run_killed_between_the_renames_is_mended_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepared(data._aside(out), "old")
    put_back(out)
    assert mark(out) == "old"
    prepared(data._aside(out), "older")
    put_back(out)
    assert mark(out) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_next_run_puts_back_what_a_killed_one_moved_even_when_it_fails_itself(
    verb: Verb, stand_in: list[DataSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise InputError("line 7 is bad")

    monkeypatch.setattr("tasks.prepare.pipeline.prepare_data", refuse)
    prepared(data._aside(tmp_path / "out"), "old")
    assert verb("prepare", "--out", str(tmp_path / "out"))[0] == 2
    assert mark(tmp_path / "out") == "old"


@pytest.mark.parametrize("name", ["inspect", "prepare"])
def test_faults_known_beforehand_are_named_before_anything_is_imported(
    name: str, capsys: pytest.CaptureFixture[str], stand_in: list[DataSettings]
) -> None:
    assert run([name, "none.jsonl"]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert run([name, "stdlib", "data.max_rws=5"]) == 2
    assert "did you mean 'data.max_rows'?" in capsys.readouterr().err
    assert run([name, "stdlib", "--model", "./none.gguf"]) == 2
    assert "none.gguf" in capsys.readouterr().err
    assert stand_in == []


def test_inspect_end_to_end(verb: Verb, home: Path) -> None:
    code, told, complaint = verb("inspect")
    assert code == 0, complaint
    assert "60 rows read = 60 used + 0 duplicates + 0 rejected" in told
    assert "<|im_end|>⟧" in told
    assert not (home / "steps").exists(), "nothing stays"
    assert not (home / "mlflow.db").exists()


def test_prepare_end_to_end(verb: Verb, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        code, told, complaint = verb("prepare", "data.template=chatml", "--out", str(out))
        assert code == 0, complaint
    assert "nothing has changed" in told
    assert "60 read" in " ".join(
        (out / "report.html").read_text().replace("<b>", "").replace("</b>", "").split()
    )
    assert not (home / "mlflow.db").exists()
