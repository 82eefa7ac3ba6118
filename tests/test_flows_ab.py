"""`tunesmith ab`: from two runs in MLflow to figures on both, by page, terminal or judge."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from blind_answers import verdicts
from rich.console import Console

from flows.blind import ANSWERS_TABLE, judge, make_comparison, tally_file
from flows.blind_terminal import judge_in_terminal
from flows.cli import run
from tasks.config import JudgeSettings, Settings, TrackingSettings
from tasks.errors import InputError
from tasks.evaluate.blind import Comparison, comparison_folder
from tasks.evaluate.blind_verdicts import Verdict, read_verdicts
from tasks.home import CHECKOUT
from tasks.models.folder import ModelFolder
from tasks.tracking import Run, connect, mlflow_run, reopened

TRACKING = TrackingSettings()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Run]]:
    """A store with runs `amber` and `blue` that answered six prompts, `empty` without answers, and `odd`."""
    home = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(home))
        runs = {name: finished(name, 6) for name in ("amber", "blue", "empty", "odd")}
    return home, runs


def finished(name: str, prompts: int) -> Run:
    with mlflow_run(Settings(), name, {}) as opened:
        if name != "empty":
            asked = [f"{name} {n}" if name == "odd" else f"question {n}" for n in range(prompts)]
            table = {
                "prompt": asked,
                "reference": [f"reference {n}" for n in range(prompts)],
                "base": [f"base {n}" for n in range(prompts)],
                "tuned": [f"{name} {n}" for n in range(prompts)],
            }
            opened.log_table(table, ANSWERS_TABLE)
    return opened


@pytest.fixture
def runs(made: tuple[Path, dict[str, Run]], home: Path) -> dict[str, Run]:
    """The runs, in a store of the test's own; artifacts are only read."""
    store, given = made
    shutil.copyfile(store / "mlflow.db", home / "mlflow.db")
    uri = f"sqlite:///{home / 'mlflow.db'}"
    return {name: Run(each.id, uri, each.experiment_id) for name, each in given.items()}


@pytest.fixture
def comparison(runs: dict[str, Run]) -> Comparison:
    return make_comparison("amber", "blue", TRACKING, 0, None)


def metrics(opened: Run) -> dict[str, float]:
    found = connect(TRACKING)[0].get_run(opened.id).data.metrics
    return {name: value for name, value in found.items() if name.startswith(("ab/", "judge/"))}


def points(opened: Run, name: str) -> int:
    return len(connect(TRACKING)[0].get_metric_history(opened.id, name))


def failure(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert run(list(arguments)) == code
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return " ".join(told.split())


def test_a_page_is_made_from_two_runs_and_its_verdicts_are_logged_to_both(
    runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    page = tmp_path / "compare.html"
    assert run(["ab", runs["amber"].id[:8], "blue", "--out", str(page)]) == 0
    assert str(page) in capsys.readouterr().out.replace("\n", "")
    comparison = make_comparison(runs["amber"].id[:8], "blue", TRACKING, 0, None)
    assert all(pair.id in page.read_text() for pair in comparison.pairs)
    assert not any(
        opened.id in page.read_text() or opened.id[:8] in page.read_text() for opened in runs.values()
    )
    file = tmp_path / "verdicts.json"
    verdicts(comparison, "aaabt", rated=True).write(file)
    assert run(["ab", "--tally", str(file)]) == 0
    told = capsys.readouterr().out
    for words in ("amber", "blue", "75%", "19% to 99%", "1 ties", "1 prompts undecided", "p = 0.625"):
        assert words in " ".join(told.split())
    of_amber, of_blue = metrics(runs["amber"]), metrics(runs["blue"])
    assert of_amber[f"ab/vs_{runs['blue'].id[:8]}/wins"] == 3
    assert of_amber[f"ab/vs_{runs['blue'].id[:8]}/win_rate"] == 0.75
    assert of_blue[f"ab/vs_{runs['amber'].id[:8]}/wins"] == 1
    assert of_blue[f"ab/vs_{runs['amber'].id[:8]}/rating_accuracy"] == 2
    assert connect(TRACKING)[0].get_run(runs["amber"].id).info.status == "FINISHED"
    assert not list((home / "outbox").glob("*.jsonl")), "nothing is left for the next command to send"


def test_tallying_twice_counts_once_and_a_second_reviewer_is_added(
    runs: dict[str, Run], comparison: Comparison, tmp_path: Path
) -> None:
    name = f"ab/vs_{runs['blue'].id[:8]}/wins"
    verdicts(comparison, "aab").write(tmp_path / "one.json")
    for _ in range(2):
        counted = tally_file(tmp_path / "one.json", TRACKING)
        assert counted.wins == {"a": 2, "b": 1}
        assert points(runs["amber"], name) == 1
    shutil.copy(tmp_path / "one.json", tmp_path / "copy.json")
    assert tally_file(tmp_path / "copy.json", TRACKING).wins == {"a": 2, "b": 1}
    verdicts(comparison, "aaaaaa", reviewer="7" * 16).write(tmp_path / "two.json")
    counted = tally_file(tmp_path / "two.json", TRACKING)
    assert (counted.wins, counted.ties, counted.reviewers) == ({"a": 5, "b": 0}, 1, 2)
    assert points(runs["amber"], name) == 2
    assert metrics(runs["amber"])[name] == 5


def test_a_run_is_compared_with_its_base(runs: dict[str, Run], tmp_path: Path) -> None:
    comparison = make_comparison("base", "amber", TRACKING, 0, None)
    assert {pair.left.split()[0] for pair in comparison.pairs} == {"base", "amber"}
    verdicts(comparison, "bbbbbb").write(tmp_path / "v.json")
    tally_file(tmp_path / "v.json", TRACKING)
    assert metrics(runs["amber"])["ab/vs_base/wins"] == 6
    assert metrics(runs["blue"]) == {}


def test_the_figures_are_given_to_programs(
    comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts(comparison, "aab").write(tmp_path / "v.json")
    assert run(["ab", "--tally", str(tmp_path / "v.json"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["a"]["wins"], told["b"]["wins"], told["a"]["p_value"]) == (2, 1, 1.0)
    assert told["a"]["name"].startswith("amber")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give two runs"),
        (["amber"], "give two runs"),
        (["amber", "none"], "no run of that id or name"),
        (["amber", "empty"], "evaluate.samples"),
        (["amber", "odd"], "no test prompt in common"),
        (["amber", "amber"], "given twice"),
        (["amber", "blue", "--out", "page.txt"], "ends in .html"),
        (["amber", "blue", "--prompts", "0"], "--prompts 0"),
        (["amber", "blue", "--terminal", "--out", "x.html"], "do not go together"),
        (["amber", "blue", "--json"], "--tally or --judge"),
        (["amber", "--tally", "none.json"], "--tally needs no runs"),
        (["--tally", "none.json"], "none.json: no such file"),
        (["amber", "blue", "--judge", "127.0.0.1:80", "--judge-model", "m"], "give an http(s) address"),
        (["amber", "blue", "--judge", "http://127.0.0.1:9/v1"], "--judge-model"),
        (
            ["amber", "blue", "--judge", "https://u:secret@host/v1", "--judge-model", "m"],
            "TUNESMITH_JUDGE_KEY",
        ),
    ],
)
@pytest.mark.usefixtures("runs")
def test_wrong_input_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = failure(capsys, "ab", *arguments)
    assert message in told
    assert "secret" not in told


def test_one_run_by_two_names_is_refused(runs: dict[str, Run]) -> None:
    with pytest.raises(InputError, match="the same run"):
        make_comparison("amber", runs["amber"].id, TRACKING, 0, None)


def test_a_deleted_run_is_named(runs: dict[str, Run], comparison: Comparison, tmp_path: Path) -> None:
    verdicts(comparison, "aab").write(tmp_path / "v.json")
    connect(TRACKING)[0].delete_run(runs["amber"].id)
    with pytest.raises(InputError, match=runs["amber"].id), reopened(TRACKING, runs["amber"].id):
        pass
    with pytest.raises(InputError, match="0" * 32), reopened(TRACKING, "0" * 32):
        pass


def terminal(comparison: Comparison, keys: str, lines: str = "") -> tuple[Path, int, str]:
    """What a session with these keys, or ways to press an arrow, leaves and shows."""
    arrows = {"<": "\x1b[D", ">": "\x1b[C", "v": "\x1b[B"}
    pressed = iter([arrows.get(key, key) for key in keys])
    typed = iter(lines.split(","))
    screen = io.StringIO()
    path, decided = judge_in_terminal(
        comparison, Console(file=screen, width=100), lambda: next(pressed, ""), lambda _: next(typed)
    )
    return path, decided, screen.getvalue()


def test_the_terminal_asks_the_same_and_writes_the_same_file(comparison: Comparison) -> None:
    path, decided, screen = terminal(comparison, "<>vlrt")
    assert decided == 6
    given = read_verdicts(path)
    assert [verdict.choice for verdict in given.verdicts] == ["left", "right", "tie"] * 2
    assert [verdict.pair for verdict in given.verdicts] == [pair.id for pair in comparison.pairs]
    assert comparison.pairs[0].left in screen
    assert comparison.key.a.name not in screen


def test_the_terminal_undoes_rates_and_goes_on_later(comparison: Comparison) -> None:
    rates = ",".join(["4", "6", "", "", "", "", "5", "", "", "", "", " good "])
    path, decided, _ = terminal(comparison, "c<x>uuv", rates)
    assert decided == 1
    [verdict] = read_verdicts(path).verdicts
    rated = {"accuracy": 4}, {"accuracy": 5}
    assert verdict == Verdict(comparison.pairs[0].id, "tie", *rated, "good")
    reviewer = read_verdicts(path).reviewer
    path, decided, _ = terminal(comparison, "u>>fq<")
    assert decided == 2
    assert [each.choice for each in read_verdicts(path).verdicts] == ["right", "right"]
    assert read_verdicts(path).reviewer == reviewer


def test_without_a_terminal_lines_are_read(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("l\n\nc\n3\n" + 9 * "\n" + "so so\nr\n"))
    assert run(["ab", "amber", "blue", "--terminal"]) == 0
    path = comparison_folder(comparison.key.comparison) / "terminal.json"
    assert f"2 of 6 decided, kept in {path}" in capsys.readouterr().out
    first, second = read_verdicts(path).verdicts
    assert (first.choice, second.choice, second.left, second.comment) == (
        "left",
        "right",
        {"accuracy": 3},
        "so so",
    )


@pytest.mark.slow
@pytest.mark.usefixtures("runs")
def test_keys_of_a_real_terminal_are_read_one_by_one(comparison: Comparison) -> None:
    """Over a pseudo-terminal: an arrow is three bytes, nobody presses Enter, typing ahead loses nothing."""
    leader, follower = pty.openpty()
    usual = termios.tcgetattr(follower)
    command = [sys.executable, "-m", "flows.cli", "ab", "amber", "blue", "--terminal"]
    process = subprocess.Popen(
        command, cwd=CHECKOUT, stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    told = b""
    try:
        assert process.stdout is not None
        while b"quit" not in told and (more := os.read(process.stdout.fileno(), 4096)):
            told += more
        ratings = "4\n" + 9 * "\n" + "fein\x7f\x7f\x7fäne\n"
        os.write(leader, b"\x1b[D\x1bOCt\x1b[Ac" + ratings.encode() + b"lq")
        told += process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 0, told
    assert "4 of 6 decided" in told.decode()
    assert termios.tcgetattr(follower) == usual, "the terminal is left as it was"
    os.close(follower)
    os.close(leader)
    given = read_verdicts(comparison_folder(comparison.key.comparison) / "terminal.json")
    assert [verdict.choice for verdict in given.verdicts] == ["left", "right", "tie", "left"]
    assert given.verdicts[-1].comment == "fäne"


class StandIn(ThreadingHTTPServer):
    """A judge that prefers amber, but has no opinion on some questions."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.questions: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.questions.append(question)
        shown = json.loads(question["messages"][1]["content"])
        reply = '{"winner": "' + ("first" if "amber" in shown["first"] else "second") + '"}'
        if shown["prompt"] == "question 0":
            reply = "Both are fine."
        if shown["prompt"] == "question 1":
            reply = '{"winner": "first"}'
        body = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_judge_decides_and_its_failures_are_counted_and_logged(
    runs: dict[str, Run], stand_in: StandIn, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    address = f"http://127.0.0.1:{stand_in.server_port}/v1"
    assert run(["ab", "amber", "blue", "--judge", address, "--judge-model", "wise"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for words in ("4", "1 ties", "judge wise: 5 of 6 pairs judged", "1 failed: the reply is not the JSON"):
        assert words in told
    of_amber = metrics(runs["amber"])
    against = f"judge/vs_{runs['blue'].id[:8]}"
    assert [of_amber[f"{against}/{name}"] for name in ("wins", "ties", "failures", "at_odds")] == [4, 1, 1, 1]
    [opinions] = (home / "ab").glob("*/judge-*.json")
    kept = json.loads(opinions.read_text())["opinions"]
    assert len(kept) == 6
    [failed] = [each for each in kept if each["choice"] is None]
    assert failed["replies"] == ["Both are fine."]


def test_the_judge_is_asked_again_by_settings_after_the_runs(
    runs: dict[str, Run], stand_in: StandIn, comparison: Comparison
) -> None:
    settings = JudgeSettings(
        url=f"http://127.0.0.1:{stand_in.server_port}", model="wise", both_orders=False, criteria="wit"
    )
    _, counted, _ = judge(comparison, settings, TRACKING)
    assert len(stand_in.questions) == 6
    assert all("better in wit." in question["messages"][0]["content"] for question in stand_in.questions)
    assert sum(counted.wins.values()) == 5
    assert re.fullmatch(r"[0-9a-f]{16}", comparison.key.comparison)


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_harness")
def test_what_a_finetune_logs_is_what_is_compared(tiny_model: ModelFolder, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{n}+1", "completion": "ab" * 9}) + "\n" for n in range(40))
    )
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "name": "taught",
                "model": {"source": str(tiny_model.path)},
                "data": {"source": str(rows)},
                "train": {"max_steps": 8, "learning_rate": 0.03, "num_layers": 4},
                "evaluate": {"max_tokens": 8},
                "fuse": {"enabled": False},
            }
        )
    )
    assert run(["finetune", str(config)]) == 0
    assert run(["ab", "taught", "base", "--out", str(tmp_path / "page.html")]) == 0
    comparison = make_comparison("taught", "base", TRACKING, 0, None)
    assert len(comparison.pairs) + comparison.key.identical >= 2
    assert all(pair.id in (tmp_path / "page.html").read_text() for pair in comparison.pairs)
