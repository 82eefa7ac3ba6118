"""A model as judge: asked both ways, read strictly, and every failure counted."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from blind_answers import comparison

from tasks.config import EvaluateSettings, JudgeSettings
from tasks.errors import InputError, StepError
from tasks.evaluate import judge, measure
from tasks.evaluate.blind import Comparison
from tasks.evaluate.judge import Judgement, ask_judge, check_judge
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput

Answer = Callable[[dict[str, str]], tuple[int, str]]
"""From what the judge is shown to a status and the text of a reply."""


class StandIn(ThreadingHTTPServer):
    """An OpenAI-compatible address on loopback whose judge is a function."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Answer = fair
        self.raw: bytes | None = None
        self.delay_s = 0.0
        self.broken = 0  # connections to close without an answer
        self.questions: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def settings(self, **given: Any) -> JudgeSettings:
        return JudgeSettings(url=f"http://127.0.0.1:{self.server_port}/v1", model="wise", **given)


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        server = self.server
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.questions.append(question)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        time.sleep(server.delay_s)
        if server.broken:
            server.broken -= 1
            server.at_once -= 1
            self.close_connection = True
            return
        status, reply = server.answer(json.loads(question["messages"][1]["content"]))
        with server.lock:
            server.at_once -= 1
        body = server.raw or json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        try:
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            pass  # whoever asked has gone

    def log_message(self, *_: object) -> None:
        pass


def fair(shown: dict[str, str]) -> tuple[int, str]:
    """Prefers amber, wherever it stands."""
    first = "amber" in shown["first"]
    return 200, json.dumps({"reason": "warmer", "winner": "first" if first else "second"})


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture
def made() -> Comparison:
    return comparison(6)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "PAUSES_S", (0.0, 0.0))
    monkeypatch.delenv("TUNESMITH_JUDGE_KEY", raising=False)


def winners(made: Comparison, judgement: Judgement) -> list[str | None]:
    return [made.key.winner(verdict.pair, verdict.choice) for verdict in judgement.verdicts()]


def test_the_better_answer_wins_wherever_it_stands(made: Comparison, server: StandIn) -> None:
    judgement = ask_judge(server.settings(), made)
    assert winners(made, judgement) == ["a"] * 6
    assert [each.pair for each in judgement.opinions] == [pair.id for pair in made.pairs]
    assert (judgement.at_odds, judgement.failures) == (0, {})
    assert len(server.questions) == 12
    assert set(server.paths) == {"/v1/chat/completions"}
    orders = {json.loads(question["messages"][1]["content"])["first"][:5] for question in server.questions}
    assert orders == {"amber", "blue "}


def test_a_judge_that_goes_by_the_place_gives_ties(made: Comparison, server: StandIn) -> None:
    server.answer = lambda _: (200, '{"winner": "first"}')
    judgement = ask_judge(server.settings(), made)
    assert winners(made, judgement) == [None] * 6
    assert judgement.at_odds == 6


def test_asked_one_way_the_order_is_that_of_the_comparison(made: Comparison, server: StandIn) -> None:
    judgement = ask_judge(server.settings(both_orders=False, concurrency=1), made)
    assert winners(made, judgement) == ["a"] * 6
    shown = [json.loads(question["messages"][1]["content"])["first"] for question in server.questions]
    assert shown == [pair.left for pair in made.pairs]
    assert len({text[:5] for text in shown}) == 2, "amber does not always come first"


def test_ties_are_allowed(made: Comparison, server: StandIn) -> None:
    server.answer = lambda _: (200, '```json\n{"winner": "tie"}\n```')
    judgement = ask_judge(server.settings(), made)
    assert winners(made, judgement) == [None] * 6
    assert judgement.at_odds == 0


@pytest.mark.parametrize(
    "reply",
    [
        "first",
        'The winner is {"winner": "first"}',
        '{"winner": "First"}',
        '{"winner": "left"}',
        '{"winner": null}',
        '{"winner": ["first"]}',
        '{"winner": "first", "winner": "second"}',
        '{"reason": "no winner"}',
        '["first"]',
        "",
        "[" * 50_000,
    ],
)
def test_a_reply_that_is_not_the_one_asked_for_fails_and_is_counted(
    reply: str, made: Comparison, server: StandIn
) -> None:
    odd = made.pairs[2].prompt
    server.answer = lambda shown: (200, reply) if shown["prompt"] == odd else fair(shown)
    judgement = ask_judge(server.settings(), made)
    assert len(judgement.opinions) == 6
    assert len(judgement.verdicts()) == 5
    assert sum(judgement.failures.values()) == 1
    assert judgement.opinions[2].replies == (reply,)


def test_the_second_question_may_fail_too(made: Comparison, server: StandIn) -> None:
    server.answer = lambda shown: fair(shown) if "amber" in shown["first"] else (200, "?")
    with pytest.raises(StepError, match="not the JSON object"):
        ask_judge(server.settings(), made)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 302])
def test_what_will_not_change_is_not_asked_again(status: int, made: Comparison, server: StandIn) -> None:
    odd = made.pairs[0].prompt
    server.answer = lambda shown: (status, "x") if shown["prompt"] == odd else fair(shown)
    judgement = ask_judge(server.settings(), made)
    [(reason, count)] = judgement.failures.items()
    assert (str(status) in reason, count) == (True, 1)
    assert len(server.questions) == 11
    assert "/elsewhere" not in server.paths


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status: int, made: Comparison, server: StandIn) -> None:
    statuses = iter([status, status])
    server.answer = lambda shown: (next(statuses, 200), fair(shown)[1])
    judgement = ask_judge(server.settings(concurrency=1), made)
    assert winners(made, judgement) == ["a"] * 6
    assert len(server.questions) == 14


@pytest.mark.parametrize(
    "raw", [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"[]"]
)
def test_an_address_that_is_no_judge_is_named(raw: bytes, made: Comparison, server: StandIn) -> None:
    server.raw = raw
    with pytest.raises(StepError, match=r"any of 6 pairs; 6 times: not a chat completion"):
        ask_judge(server.settings(), made)


def test_a_judge_that_does_not_answer_is_given_up(made: Comparison, server: StandIn) -> None:
    server.delay_s = 1.0
    with pytest.raises(StepError, match=r"no answer within 0\.05 s \(evaluate\.judge\.timeout_s\), 3 times"):
        ask_judge(server.settings(timeout_s=0.05, concurrency=6), made)


def test_an_address_where_nobody_listens_is_named_at_once(
    made: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(judge, "PAUSES_S", (3600.0,))
    with pytest.raises(StepError, match="6 times: ConnectError"):
        ask_judge(JudgeSettings(url=f"http://127.0.0.1:{port}", model="wise"), made)


def test_a_connection_that_breaks_is_made_again(made: Comparison, server: StandIn) -> None:
    server.broken = 2
    judgement = ask_judge(server.settings(concurrency=1), made)
    assert winners(made, judgement) == ["a"] * 6


def test_questions_are_asked_at_once_but_not_more_than_allowed(made: Comparison, server: StandIn) -> None:
    server.delay_s = 0.05
    ask_judge(server.settings(concurrency=3), made)
    assert 1 < server.most_at_once <= 3


def test_the_key_comes_from_the_environment_and_is_never_told(
    made: Comparison, server: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", "sesame")
    monkeypatch.setenv("OPENAI_API_KEY", "not for strangers")
    judgement = ask_judge(server.settings(api_key_env="MY_KEY"), made)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sesame"}
    server.answer = lambda _: (401, "x")
    with pytest.raises(StepError, match="does \\$MY_KEY hold the key") as told:
        ask_judge(server.settings(api_key_env="MY_KEY"), made)
    assert "sesame" not in caplog.text + str(told.value) + json.dumps(judgement.as_json())
    server.headers.clear()
    server.answer = fair
    ask_judge(server.settings(), made)
    assert all("Authorization" not in headers for headers in server.headers)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (None, "give an http"),
        ("localhost:8080", "give an http"),
        ("file:///etc/passwd", "give an http"),
        ("https://user:sesame@host/v1", "instead"),
        ("http://192.168.1.7:8080/v1", "plain text"),
    ],
)
def test_addresses_that_would_not_do_are_refused(
    url: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_JUDGE_KEY", "sesame")
    with pytest.raises(InputError, match=message) as told:
        check_judge(JudgeSettings(url=url, model="wise"))
    assert "sesame" not in str(told.value)


def test_a_judge_in_the_next_room_needs_no_key() -> None:
    check_judge(JudgeSettings(url="http://192.168.1.7:8080/v1", model="wise"))
    with pytest.raises(InputError, match="--judge-model"):
        check_judge(JudgeSettings(url="http://192.168.1.7:8080/v1"))


def test_answers_are_shown_as_data(made: Comparison, server: StandIn) -> None:
    ask_judge(server.settings(criteria="wit", temperature=None), made)
    system, user = server.questions[0]["messages"]
    assert "better in wit." in system["content"]
    assert set(json.loads(user["content"])) == {"prompt", "reference", "first", "second"}
    assert "temperature" not in server.questions[0]
    assert server.questions[0]["model"] == "wise"


def test_the_judge_is_no_part_of_what_an_evaluation_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another judge must not have every answer generated again."""
    inputs: list[Any] = []
    monkeypatch.setattr(measure, "run_step", lambda _, given, __: inputs.append(given))
    model, data = ModelFolder(Path("model"), "m", "m", "m"), StepOutput(Path("data"), "d", True, 0.0)
    for settings in (EvaluateSettings(), EvaluateSettings(judge=JudgeSettings(model="wise"))):
        measure.measure(settings, model, None, data)
    assert inputs[0] == inputs[1]
    measure.measure(EvaluateSettings(max_tokens=7), model, None, data)
    assert inputs[2] != inputs[0]
