"""Talking to a model in the terminal: answers as they are written, the chat so far, and how to end it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from tasks.answer import Answering, Piece, Sampling
from tasks.errors import InputError
from tasks.prepare.page import printable
from tasks.prepare.rows import Messages

COMMANDS = "/reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer"

Ask = Callable[[], str]
"""Gives the next line that a person typed; raises EOFError at the end of them."""

Say = Callable[[str], None]
"""Shows some text, without a line feed after it."""


def chat(answering: Answering, sampling: Sampling, system: str | None, ask: Ask, say: Say) -> None:
    """Answer until `ask` ends. What an answer held when it was stopped stays in the chat.

    Args:
        system: a system prompt in place of the one of the training.
    """
    messages = _beginning(system)
    while True:
        try:
            line = ask().strip()
        except EOFError:
            say("\n")
            return
        except KeyboardInterrupt:
            say(f"\n{COMMANDS}\n")
            continue
        if line == "/quit":
            return
        if line == "/reset":
            messages = _beginning(system)
            say("A new chat.\n")
        elif line.startswith("/"):
            say(f"'{printable(line)}' is no command: {COMMANDS}\n")
        elif line:
            messages = _exchange(answering, sampling, messages, line, say)


def answer_once(
    answering: Answering, sampling: Sampling, system: str | None, prompt: str, say: Say | None
) -> dict[str, Any]:
    """Answer one prompt; with `say`, the text is shown as it arrives.

    Returns:
        `prompt`, `answer`, `tokens`, `tokens_per_second`, and `ended_by`: "stop" or "length".
    """
    asked: Messages = [*_beginning(system), {"role": "user", "content": prompt}]
    pieces = []
    for piece in answering.stream(asked, sampling):
        pieces.append(piece)
        if say is not None:
            say(printable(piece.text) if sys.stdout.isatty() else piece.text)
    last = pieces[-1]
    return {
        "prompt": prompt,
        "answer": "".join(piece.text for piece in pieces),
        "tokens": last.tokens,
        "tokens_per_second": last.tokens_per_second,
        "ended_by": last.ended_by,
    }


def _beginning(system: str | None) -> Messages:
    return [] if system is None else [{"role": "system", "content": system}]


def _exchange(
    answering: Answering, sampling: Sampling, messages: Messages, question: str, say: Say
) -> Messages:
    """The chat with a question and its answer; as it was, when there is no answer."""
    asked: Messages = [*messages, {"role": "user", "content": question}]
    written: list[str] = []
    try:
        for text in _shown(answering.stream(asked, sampling), sampling, say):
            written.append(text)
    except KeyboardInterrupt:
        say(" [stopped]\n")
    except InputError as error:
        say(f"{error}; /reset does\n" if messages else f"{error}\n")
    answer = "".join(written)
    return [*asked, {"role": "assistant", "content": answer}] if answer else messages


def _shown(pieces: Iterator[Piece], sampling: Sampling, say: Say) -> Iterator[str]:
    for piece in pieces:
        say(printable(piece.text))
        yield piece.text
        if piece.ended_by == "length":
            say(f" [cut at {sampling.max_tokens} tokens: --max-tokens]")
    say("\n")
