"""The forms a row may be written in, told apart row by row by their keys."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.errors import InputError
from tasks.prepare.rows import ROLES, Messages

BAD_ROWS_SHOWN = 10


class BadRowError(ValueError):
    """A row that cannot be used: what is wrong with it, and what to do."""


def bad_rows_error(source: str, faults: Sequence[tuple[int, str]]) -> InputError:
    """What to raise for (line, what is wrong) of each bad row: the first ten, and how many more."""
    shown = [f"{source}, line {line}: {fault}" for line, fault in faults[:BAD_ROWS_SHOWN]]
    if more := len(faults) - len(shown):
        shown.append(f"{source}: and {more} more bad row{'s' * (more > 1)}")
    return InputError("\n".join(shown))


@dataclass(frozen=True)
class Format:
    """One form: the keys it has to have, those it may have, and how it becomes a conversation."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    messages: Callable[[Mapping[str, Any]], Messages]


def to_messages(row: Any) -> tuple[str, Messages]:
    """The name of a parsed row's format, and its turns.

    Raises:
        BadRowError: unknown or missing keys, wrong types, unknown roles, or nothing to learn from.
    """
    if not isinstance(row, dict):
        raise BadRowError(f"is a {_type(row)}, not an object; write one {{…}} a line")
    name = _detect(row)
    messages = FORMATS[name].messages(row)
    roles = [turn["role"] for turn in messages]
    for role in ("user", "assistant"):
        if role not in roles:
            raise BadRowError(f"has no {role} turn; add one or remove the row")
    for position, turn in enumerate(messages, start=1):
        _check_text(turn["content"], f"text of turn {position} ({turn['role']})")
    return name, messages


def _detect(row: Mapping[str, Any]) -> str:
    for name, form in FORMATS.items():
        if not all(key in row for key in form.required):
            continue
        known = (*form.required, *form.optional)
        if unknown := [key for key in row if key not in known]:
            taken = f"a '{name}' row takes {', '.join(known)}"
            raise BadRowError(f"has {_unknown(unknown, known)}; {taken}: remove what is more")
        return name
    forms = "; ".join("+".join(form.required) for form in FORMATS.values())
    keys = ", ".join(f"'{key}'" for key in row) or "no keys"
    raise BadRowError(f"has {keys}, which is no known form; use one of: {forms}")


def _unknown(unknown: list[str], known: tuple[str, ...]) -> str:
    keys = ", ".join(f"'{key}'" for key in unknown)
    close = difflib.get_close_matches(unknown[0], known, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"the unknown key{'s' * (len(unknown) > 1)} {keys}{hint}"


def _from_messages(row: Mapping[str, Any]) -> Messages:
    turns = row["messages"]
    if not isinstance(turns, list):
        raise BadRowError(f"'messages' is a {_type(turns)}; give a list of turns")
    return [_turn(turn, position) for position, turn in enumerate(turns, start=1)]


def _turn(turn: Any, position: int) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise BadRowError(f"turn {position} is a {_type(turn)}; give an object with 'role' and 'content'")
    for key in ("role", "content"):
        if key not in turn:
            raise BadRowError(f"turn {position} lacks '{key}'; give it 'role' and 'content'")
    if unknown := [key for key in turn if key not in ("role", "content")]:
        raise BadRowError(f"turn {position} has {_unknown(unknown, ('role', 'content'))}; remove it")
    role = turn["role"]
    if role not in ROLES:
        raise BadRowError(f"turn {position} has the unknown role {role!r}; use one of {', '.join(ROLES)}")
    return {"role": role, "content": _text(turn["content"], f"'content' of turn {position}")}


def _pair(question: str, answer: str) -> Callable[[Mapping[str, Any]], Messages]:
    def messages(row: Mapping[str, Any]) -> Messages:
        return _exchange(_text(row[question], f"'{question}'"), _text(row[answer], f"'{answer}'"))

    return messages


def _from_instruction(row: Mapping[str, Any]) -> Messages:
    parts = [_text(row["instruction"], "'instruction'"), _text(row.get("input", ""), "'input'")]
    return _exchange("\n\n".join(filter(None, parts)), _text(row["output"], "'output'"))


def _exchange(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{name} is a {_type(value)}; give a string")
    return value


def _check_text(text: str, name: str) -> None:
    if not text.strip():
        raise BadRowError(f"has an empty {name}; fill it or remove the row")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRowError(f"has half of a surrogate pair in the {name}; write the whole character")


def _type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


FORMATS = {
    "messages": Format(("messages",), (), _from_messages),
    "prompt+completion": Format(("prompt", "completion"), (), _pair("prompt", "completion")),
    "prompt+response": Format(("prompt", "response"), (), _pair("prompt", "response")),
    "question+answer": Format(("question", "answer"), (), _pair("question", "answer")),
    "instruction+output": Format(("instruction", "output"), ("input",), _from_instruction),
}
