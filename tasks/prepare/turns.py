"""Turns of a chat as datasets write them, as a chat template takes them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.prepare.faults import LONGEST_NAME, BadRowError, shown, type_name
from tasks.prepare.rows import ROLES, Messages, Turn
from tasks.prepare.strict_json import StrictJson

CALLS = "function_call"  # ShareGPT's word for an assistant's turn that is a tool call, written as JSON

SHAREGPT_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", CALLS), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
TOOL_KEYS = ("tool_calls", "tool_call_id", "name")


@dataclass(frozen=True)
class TurnStyle:
    """How turns are written: the keys that say who speaks and what, and each word for a role."""

    role_keys: tuple[str, ...]
    content_keys: tuple[str, ...]
    roles: Mapping[str, str]


MESSAGES = TurnStyle(("role",), ("content",), {role: role for role in ROLES})
CONVERSATIONS = TurnStyle(("from", "role"), ("value", "content"), SHAREGPT_ROLES)


def read_turns(value: Any, column: str, style: TurnStyle, not_learnt: list[str]) -> Messages:
    """The turns of a list, or of a string of JSON that is one.

    Args:
        column: its name in the row, for messages.
        not_learnt: gets `column.key` for each key of a turn that is not used.

    Raises:
        BadRowError: a value of the wrong type, or a turn without role or text.
    """
    turns = as_list(value, column)
    return [
        _turn(turn, f"turn {position} of '{column}'", column, style, not_learnt)
        for position, turn in enumerate(turns, start=1)
    ]


def read_tools(value: Any, column: str) -> list[dict[str, Any]] | None:
    """The tools of a row, each in the form {"type": "function", "function": {"name", …}}; None for none."""
    if value is None or value == "":
        return None
    tools = [_tool(tool, f"tool {n} of '{column}'") for n, tool in enumerate(as_list(value, column), start=1)]
    check_characters(tools, f"'{column}'")
    return tools or None


def read_text(value: Any, place: str) -> str:
    """A string, or a list of content parts of type text, joined.

    Raises:
        BadRowError: another type, or characters that no text has.
    """
    if isinstance(value, list):
        value = "".join(_part(part, place) for part in value)
    if not isinstance(value, str):
        raise BadRowError("type", f"{place} is {type_name(value)}; give a string")
    check_characters(value, place)
    return value


def is_empty(text: str) -> bool:
    """Whether there is nothing but white space."""
    return not text or text.isspace()


def as_list(value: Any, column: str) -> list[Any]:
    """A list, or one written as a string of JSON, as CSV and some Parquet files do."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = StrictJson().parse(value)
        except BadRowError as fault:
            raise BadRowError(fault.kind, f"'{column}' {fault}") from None
    if value is None:
        raise BadRowError("empty", f"has an empty '{column}'; fill it or remove the row")
    if not isinstance(value, list):
        raise BadRowError("type", f"'{column}' is {type_name(value)}; give a list")
    return value


def near_miss(name: str, known: tuple[str, ...]) -> str:
    """ " (did you mean 'input'?)" where a name is nearly one of the known; else empty."""
    close = difflib.get_close_matches(name[:LONGEST_NAME], known, n=1, cutoff=0.75)
    return f" (did you mean '{close[0]}'?)" if close else ""


def check_characters(value: Any, place: str) -> None:
    """Refuse halves of surrogate pairs and NUL anywhere in a value."""
    for text in [value] if isinstance(value, str) else _strings(value):
        if "\0" in text:
            raise BadRowError("nul", f"{place} holds a NUL character; remove it")
        try:
            text.isascii() or text.encode("utf-8")
        except UnicodeEncodeError:
            detail = f"{place} holds half of a surrogate pair; write the whole character"
            raise BadRowError("surrogate", detail) from None


def _turn(turn: Any, place: str, column: str, style: TurnStyle, not_learnt: list[str]) -> Turn:
    if not isinstance(turn, dict):
        raise BadRowError("type", f"{place} is {type_name(turn)}; give an object with a role and a text")
    role_key = _present(turn, style.role_keys)
    content_key = _present(turn, style.content_keys)
    word = _role_word(turn.get(role_key), place, style)
    read: Turn = {"role": style.roles[word]}
    place = f"{place} ({word})"
    if (content := turn.get(content_key)) is None:
        content = ""
    calls = turn.get("tool_calls")
    if word == CALLS:
        calls = calls or _written_calls(content)
        content = "" if calls else content
    read["content"] = read_text(content, f"the '{content_key}' of {place}")
    for key in turn:
        if key != role_key and key != content_key:
            if key in TOOL_KEYS:
                _read_more(turn, key, read, place)
            else:
                not_learnt.append(f"{column}.{shown(key)}{near_miss(key, TOOL_KEYS)}")
    if calls:
        read["tool_calls"] = _calls(calls, read["role"], place)
    elif read["role"] in ("user", "assistant") and is_empty(read["content"]):
        raise BadRowError("empty", f"{place} has an empty '{content_key}'; fill it or remove the row")
    return read


def _present(turn: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    for key in keys:
        if turn.get(key) is not None:
            return key
    return keys[0]


def _role_word(word: Any, place: str, style: TurnStyle) -> str:
    key = style.role_keys[0]
    if word is None or word == "":
        raise BadRowError("role", f"{place} has no '{key}'; give one of {', '.join(style.roles)}")
    if not isinstance(word, str):
        raise BadRowError("type", f"the '{key}' of {place} is {type_name(word)}; give a string")
    if word not in style.roles:
        choices = f"use one of {', '.join(style.roles)}"
        if word in SHAREGPT_ROLES:
            choices += ", or set data.mapping.messages to this column, which reads this word too"
        raise BadRowError("role", f"{place} has the unknown role '{shown(word)}'; {choices}")
    return word


def _read_more(turn: Mapping[str, Any], key: str, read: Turn, place: str) -> None:
    if key != "tool_calls" and (value := turn[key]) is not None:
        if not isinstance(value, str):
            raise BadRowError("type", f"the '{key}' of {place} is {type_name(value)}; give a string")
        check_characters(value, f"the '{key}' of {place}")
        read[key] = value


def _calls(calls: Any, role: str, place: str) -> list[dict[str, Any]]:
    if role != "assistant":
        raise BadRowError("role", f"{place} has 'tool_calls'; only an assistant calls tools")
    if not isinstance(calls, list):
        raise BadRowError("type", f"the 'tool_calls' of {place} are {type_name(calls)}; give a list")
    read = [_call(call, place) for call in calls]
    check_characters(read, f"the 'tool_calls' of {place}")
    return read


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRowError("type", f"a tool call of {place} has no name; give a 'function' with a 'name'")
    # Templates write arguments as JSON: a string of JSON would be encoded twice.
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
        try:
            arguments = StrictJson().parse(arguments)
        except BadRowError as fault:
            if fault.kind != "json":
                raise BadRowError(fault.kind, f"a tool call's arguments of {place}: {fault}") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict | str):
        detail = f"a tool call's arguments of {place} are {type_name(arguments)}; give an object"
        raise BadRowError("type", detail)
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _written_calls(text: Any) -> list[Any] | None:
    """The calls of a `function_call` turn: JSON of {name, arguments}, or a list of them; else None."""
    try:
        value = StrictJson().parse(text) if isinstance(text, str) else None
    except BadRowError:
        return None
    calls = value if isinstance(value, list) else [value]
    is_call = [isinstance(call, dict) and "name" in call and "arguments" in call for call in calls]
    return calls if calls and all(is_call) else None


def _tool(tool: Any, place: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise BadRowError("type", f"{place} is {type_name(tool)}; give an object")
    read = tool if "function" in tool else {"type": "function", "function": tool}
    if not isinstance(read["function"], dict) or not isinstance(read["function"].get("name"), str):
        raise BadRowError("type", f"{place} has no name; give a 'function' with a 'name'")
    return read


def _part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = f"one of type '{shown(str(part.get('type')))}'" if isinstance(part, dict) else type_name(part)
    needed = 'each part has to be {"type": "text", "text": "…"}'
    raise BadRowError("type", f"{place} has a part that is {kind}; {needed}")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
