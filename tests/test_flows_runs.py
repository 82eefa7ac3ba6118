"""Runs in a table, curves in the terminal, the machine's figures beside a run, and who is told of its end."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from flows import watch as watching
from flows.cli import run as command
from flows.curves import draw_curves
from flows.finetune import finetune
from flows.notify import notify, tell
from flows.retrain import retrain
from flows.run_tables import duration, print_runs
from flows.watch import watch
from tasks import system_metrics as sampling
from tasks.alive import this_process
from tasks.config import FlowSettings, Settings, TrackingSettings
from tasks.outbox import Point, kept_points
from tasks.run_records import PARENT, RunRecord, curves, merged, run_records
from tasks.system_metrics import figures, system_metrics
from tasks.tracking import PROCESS, connect, mlflow_run

pytestmark = pytest.mark.usefixtures("store")


def started(name: str, tags: dict[str, str] | None = None, **metrics: float) -> str:
    client, _, experiment = connect(TrackingSettings())
    run_id = str(client.create_run(experiment, tags=tags or {}, run_name=name).info.run_id)
    for metric, value in metrics.items():
        client.log_metric(run_id, metric.replace("test_chrf", "test/chrf"), value)
    return run_id


def ended(run_id: str, status: str = "FINISHED") -> str:
    client, _, _ = connect(TrackingSettings())
    client.set_terminated(run_id, status)
    return run_id


def printed(records: list[RunRecord]) -> str:
    console = Console(file=io.StringIO(), width=140)
    print_runs(console, records)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_runs_are_listed_newest_first_without_the_trials_of_searches() -> None:
    first = ended(started("first", test_loss=2.5))
    ended(started("trial-0", {PARENT: first}, best_val_loss=1.0))
    ended(started("second", test_loss=2.25, test_chrf=31.0), "FAILED")
    assert [record.name for record in run_records(TrackingSettings(), 9)] == ["second", "first"]
    assert [record.name for record in run_records(TrackingSettings(), 1)] == ["second"]
    assert len(run_records(TrackingSettings(), 9, trials=True)) == 3
    told = printed(run_records(TrackingSettings(), 9))
    assert "2.2500" in told
    assert "failed" in told
    assert "memory" not in told, "a figure that no run has is no column"


def test_a_run_whose_process_is_gone_is_not_shown_as_running() -> None:
    host = this_process().rsplit(" ", 2)[0]
    started("gone", {PROCESS: f"{host} 1 1.00"})
    started("lives", {PROCESS: this_process()})
    assert [record.state for record in run_records(TrackingSettings(), 9)] == ["RUNNING", "DEAD"]


@pytest.mark.parametrize(
    ("seconds", "told"), [(9, "9 s"), (99, "99 s"), (100, "2 min"), (5400, "90 min"), (9000, "2.5 h")]
)
def test_times_are_told_in_the_unit_that_fits(seconds: int, told: str) -> None:
    assert duration(RunRecord("", "", "FINISHED", 0, 1000 * seconds, None, {}, {}, {})) == told


def test_the_command_prints_a_table_json_or_what_to_do_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["runs"]) == 0
    assert "tunesmith quickstart" in capsys.readouterr().out
    run_id = ended(started("sums", test_loss=2.5))
    assert command(["runs", "--json"]) == 0
    [record] = json.loads(capsys.readouterr().out)
    assert (record["id"], record["state"], record["figures"]) == (run_id, "FINISHED", {"test_loss": 2.5})
    assert command(["runs", "--last", "0"]) == 2
    assert "--last 0" in capsys.readouterr().err


def test_curves_hold_what_still_waits_to_be_sent(home: Path) -> None:
    client, _, _ = connect(TrackingSettings())
    run_id = started("sums")
    client.log_metric(run_id, "train_loss", 3.0, step=1)
    folder = home / "outbox"
    folder.mkdir()
    waiting = [
        {"run": run_id, "store": "s"},
        {"time_ms": 1, "step": 2, "metrics": {"train_loss": 2.5, "x": 1}},
    ]
    text = "".join(json.dumps(line) + "\n" for line in waiting)
    (folder / f"{run_id}.jsonl").write_text(text + '{"time_ms": 2, "st')
    assert [point.step for point in kept_points(folder, run_id)] == [2, 2]
    (folder / f"{run_id}.lock").touch()
    points = {"train_loss": {1: 3.0}, "val_loss": {}}
    assert merged(points, kept_points(folder, run_id)) == {"train_loss": [(1, 3.0), (2, 2.5)], "val_loss": []}
    assert merged(points, [Point("train_loss", 2.0, 0, 1)])["train_loss"] == [(1, 2.0)]
    (folder / f"{run_id}.jsonl").unlink()
    assert curves(TrackingSettings(), run_id, ("train_loss",)) == {"train_loss": [(1, 3.0)]}


def test_a_falling_curve_falls_from_the_upper_left_to_the_lower_right() -> None:
    drawn = draw_curves({"train_loss": [(0, 4.0), (100, 2.0)]}, 49, 12).plain.splitlines()
    canvas = [line[9:] for line in drawn[:10]]
    assert canvas[0][0] != " "
    assert canvas[0][-1] == " "
    assert canvas[-1][-1] != " "
    assert canvas[-1][0] == " "
    assert drawn[0].strip().startswith("4 ┤")
    assert drawn[9].strip().startswith("2 ┤")
    assert drawn[10].split() == ["0", "100"]
    assert "train_loss 2" in drawn[11]


def test_curves_of_nothing_of_one_point_and_of_no_number_are_drawn() -> None:
    assert draw_curves({"train_loss": []}, 60, 12).plain == "no figures yet"
    assert "train_loss 3" in draw_curves({"train_loss": [(1, 3.0)]}, 60, 12).plain
    told = draw_curves({"a": [(1, float("nan")), (2, 1.0)], "b": [(1, float("inf"))]}, 60, 12).plain
    assert "a 1" in told
    assert "── b" not in told


def test_a_run_is_watched_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    client, _, _ = connect(TrackingSettings())
    run_id = started("sums", {PROCESS: this_process()})
    client.log_metric(run_id, "train_loss", 3.5, step=1)
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    looks: list[float] = []

    def next_look(seconds: float) -> None:
        looks.append(seconds)
        client.log_metric(run_id, "train_loss", 1.25, step=len(looks) + 1)
        if len(looks) == 2:
            client.set_terminated(run_id, "FINISHED")

    monkeypatch.setattr(watching.time, "sleep", next_look)
    assert watch(console, TrackingSettings(), run_id).state == "FINISHED"
    assert len(looks) == 2
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 3" in told
    assert "train_loss 1.25" in told


def test_a_store_that_does_not_answer_does_not_end_the_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = started("sums", {PROCESS: this_process()}, train_loss=3.0)
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    plain: Callable[..., Any] = watching.look_at
    looks: list[str] = []

    def look(*given: Any) -> Any:
        looks.append("look")
        if len(looks) == 2:
            raise ConnectionError("the server is down")
        if len(looks) == 3:
            ended(run_id)
        return plain(*given)

    monkeypatch.setattr(watching, "look_at", look)
    monkeypatch.setattr(watching, "LOOK_EVERY_S", 0.6)  # the screen is drawn twice a second
    assert watch(console, TrackingSettings(), run_id).state == "FINISHED"
    assert "the server is down" in console.file.getvalue()  # type: ignore[attr-defined]


def test_of_runs_of_one_name_the_newest_is_watched(capsys: pytest.CaptureFixture[str]) -> None:
    ended(started("nightly", train_loss=4.0))
    newest = ended(started("nightly", train_loss=3.0))
    assert command(["watch", "nightly", "--once"]) == 0
    told = capsys.readouterr().out
    assert newest[:8] in told
    assert "train_loss 3" in told
    assert command(["watch", "none"]) == 2


def test_the_machines_figures_go_through_the_outbox_with_steps_in_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "EVERY_S", 0.02)
    sampled = threading.Event()
    plain = figures

    def watched(process: Any) -> dict[str, float]:
        sampled.set()
        return plain(process)

    monkeypatch.setattr(sampling, "figures", watched)
    with mlflow_run(Settings(), "sums", {}) as run:
        with system_metrics(run, run.started_ms() - 60_000):
            assert sampled.wait(60)
        assert run.flush()
        points = run.client.get_metric_history(run.id, "system/cpu_utilization_percentage")
    assert 60 <= points[0].step < 600
    assert 0 < plain(sampling_process())["system/system_memory_usage_percentage"] <= 100


def sampling_process() -> Any:
    import psutil

    return psutil.Process()


RECORD = {"event": "failure", "flow": "retrain", "run": "nightly", "state": "Failed", "message": "loss nan"}


def test_a_command_is_given_the_record_on_its_input_and_in_variables(tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    tell(FlowSettings(notify_command=f'{{ cat; printf %s "$TUNESMITH_RUN"; }} > {told}'), RECORD)
    assert told.read_text() == json.dumps(RECORD) + "nightly"


def test_a_command_that_fails_is_only_told_of(caplog: pytest.LogCaptureFixture) -> None:
    tell(FlowSettings(notify_command="echo no mail here >&2; exit 3"), RECORD)
    assert "ended with code 3: no mail here" in caplog.text


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, str]]]:
    """What arrives at the address in TUNESMITH_WEBHOOK."""
    arrived: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            arrived.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if len(arrived) > 1 else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TUNESMITH_WEBHOOK", f"http://127.0.0.1:{server.server_port}/token-4711")
    yield arrived
    server.shutdown()
    server.server_close()


def test_an_address_is_posted_to_and_its_token_is_not_logged(
    posted: list[dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    tell(FlowSettings(), RECORD)
    assert posted[0]["message"] == "loss nan"
    assert posted[0]["text"] == "retrain nightly: failure. loss nan"
    tell(FlowSettings(), RECORD)
    assert "TUNESMITH_WEBHOOK was not told" in caplog.text
    assert "4711" not in caplog.text


def test_only_wanted_ends_are_told(posted: list[dict[str, str]]) -> None:
    tell(FlowSettings(notify_on="success"), RECORD)
    assert not posted
    tell(FlowSettings(notify_on="failure"), RECORD)
    assert len(posted) == 1


def test_the_hook_tells_of_the_outer_flow_alone(posted: list[dict[str, str]]) -> None:
    def flow_run(parent: str | None) -> Any:
        parameters = {"settings": Settings().model_dump(mode="json", by_alias=True)}
        return SimpleNamespace(id="1", name="nightly", parent_task_run_id=parent, parameters=parameters)

    state: Any = SimpleNamespace(type=SimpleNamespace(value="COMPLETED"), name="Completed", message="kept")
    notify(flow=finetune, flow_run=flow_run("a task"), state=state)
    assert not posted
    notify(flow=finetune, flow_run=flow_run(None), state=state)
    assert (posted[0]["event"], posted[0]["flow"]) == ("success", "finetune")


@pytest.mark.parametrize("deployed", [finetune, retrain])
def test_flows_call_the_hook_however_they_end(deployed: Any) -> None:
    hooks = [deployed.on_completion_hooks, deployed.on_failure_hooks]
    hooks += [deployed.on_crashed_hooks, deployed.on_cancellation_hooks]
    assert all(notify in each for each in hooks)
