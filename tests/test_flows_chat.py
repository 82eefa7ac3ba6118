"""The chat in the terminal: what is kept of it, what ends it, and what its text may do to the screen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from flows.chat import answer_once, chat
from tasks.answer import Piece, Sampling
from tasks.errors import InputError
from tasks.prepare.rows import Messages


class Parrot:
    """Answers with what it was asked, letter by letter, and remembers the chats it was given."""

    def __init__(self) -> None:
        self.given: list[Messages] = []

    def stream(self, messages: Messages, sampling: Sampling) -> Iterator[Piece]:
        self.given.append(messages)
        text = messages[-1]["content"]
        if text == "too long":
            raise InputError("the chat is 9 tokens long, the model reads 8; begin anew")
        for count, letter in enumerate(text, 1):
            if letter == "^":
                raise KeyboardInterrupt
            ended = ("length" if text.endswith("…") else "stop") if count == len(text) else None
            yield Piece(letter, count, 1.0, ended)


def talk(*typed: str | type[BaseException], system: str | None = None) -> tuple[Parrot, str]:
    """A chat of what is typed; an exception is what comes in place of a line."""
    lines = iter(typed)
    shown: list[str] = []

    def ask() -> str:
        line = next(lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    parrot: Any = Parrot()
    chat(parrot, Sampling(), system, ask, shown.append)
    return parrot, "".join(shown)


def texts(messages: Messages) -> list[str]:
    return [turn["content"] for turn in messages]


def test_questions_and_answers_stay_in_the_chat() -> None:
    parrot, shown = talk("one", "two", system="Be brief.")
    assert texts(parrot.given[-1]) == ["Be brief.", "one", "one", "two"]
    assert [turn["role"] for turn in parrot.given[-1]] == ["system", "user", "assistant", "user"]
    assert shown == "one\ntwo\n\n"


def test_reset_begins_anew_with_the_system_prompt() -> None:
    parrot, _ = talk("one", "/reset", "two", system="Be brief.")
    assert texts(parrot.given[-1]) == ["Be brief.", "two"]


def test_quit_and_the_end_of_input_end_it() -> None:
    assert len(talk("one", "/quit", "two")[0].given) == 1
    assert len(talk("one", EOFError, "two")[0].given) == 1


def test_a_stopped_answer_stays_as_far_as_it_was_written_and_an_empty_one_not_at_all() -> None:
    parrot, shown = talk("ab^c", "^", "next")
    assert texts(parrot.given[-1]) == ["ab^c", "ab", "next"]
    assert "ab [stopped]\n" in shown


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_goes_on() -> None:
    parrot, shown = talk(KeyboardInterrupt, "one")
    assert "Ctrl-D ends" in shown
    assert len(parrot.given) == 1


def test_a_chat_that_is_too_long_is_told_and_the_chat_stays_as_it_was() -> None:
    parrot, shown = talk("one", "too long", "two")
    assert texts(parrot.given[-1]) == ["one", "one", "two"]
    assert "the model reads 8; begin anew; /reset does" in shown


def test_unknown_commands_are_named_and_empty_lines_passed_over() -> None:
    parrot, shown = talk("/rest", "", "  ")
    assert "'/rest' is no command: /reset begins anew" in shown
    assert parrot.given == []


def test_an_answer_cannot_steer_the_terminal() -> None:
    parrot, shown = talk("a\x1b[2Jb", "next")
    assert "\x1b" not in shown
    assert texts(parrot.given[-1])[1] == "a\x1b[2Jb", "the model is given back what it wrote"


def test_an_answer_that_was_cut_says_what_cut_it() -> None:
    _, shown = talk("and so on…")
    assert "[cut at 256 tokens: --max-tokens]" in shown


def test_one_answer_is_shown_as_it_comes_and_told_when_it_is_done() -> None:
    shown: list[str] = []
    parrot: Any = Parrot()
    told = answer_once(parrot, Sampling(), "Be brief.", "hey", shown.append)
    assert shown == ["h", "e", "y"]
    assert told == {
        "prompt": "hey",
        "answer": "hey",
        "tokens": 3,
        "tokens_per_second": 1.0,
        "ended_by": "stop",
    }
    assert texts(parrot.given[0]) == ["Be brief.", "hey"]


@pytest.mark.parametrize("say", [None])
def test_nothing_is_shown_where_nothing_is_to_be(say: None, capsys: pytest.CaptureFixture[str]) -> None:
    parrot: Any = Parrot()
    answer_once(parrot, Sampling(), None, "hey", say)
    assert capsys.readouterr().out == ""
