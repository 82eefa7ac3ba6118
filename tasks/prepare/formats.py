"""The forms a row may be written in, told apart row by row by their columns, or given by `data.mapping`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tasks.config import MappingSettings
from tasks.prepare.faults import BadRowError, listed, shown, type_name
from tasks.prepare.files import Part
from tasks.prepare.rows import Messages, Note, Row, Stream
from tasks.prepare.turns import (
    CONVERSATIONS,
    MESSAGES,
    SHAREGPT_ROLES,
    TurnStyle,
    is_empty,
    near_miss,
    read_text,
    read_tools,
    read_turns,
)

MAPPED = "mapped"  # the format of rows read by `data.mapping`
SHAPES_KEPT = 1024  # so that rows of ever new columns do not fill the memory


class Content(NamedTuple):
    """What is learnt of a row."""

    messages: Messages
    text: str = ""
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Form:
    """One form: the columns it has to have, those it may have, and how they are read.

    `read` gets the row, and a list that takes the names of what in its turns is not learnt.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any], list[str]], Content]


class Forms:
    """Makes rows of parsed values, and remembers over a whole source which columns it has noted."""

    def __init__(self, mapping: MappingSettings) -> None:
        self._forms = FORMATS
        if any(mapping.model_dump().values()):
            self._forms = {MAPPED: _mapped_form(mapping)}
        self._shapes: dict[tuple[str, ...], tuple[str, str]] = {}
        self._noted: set[str] = set()

    def rows(self, part: Part, line: int, value: Any, text: str) -> Stream:
        """What is odd about a parsed value, then its row, or why it is none.

        Args:
            text: the row as written; a bad row keeps its beginning.
        """
        not_learnt: list[str] = []
        try:
            if not isinstance(value, dict):
                raise BadRowError("type", f"is {type_name(value)}; a row has to be {ROW}")
            name, others = self._shape(value, not_learnt)
            if others:
                yield part.note(line, "two_forms", others)
            content = self._forms[name].read(value, not_learnt)
            if content.messages or not content.text:
                _check_speakers(content.messages)
        except BadRowError as fault:
            yield from self._column_notes(part, line, not_learnt)
            yield part.unused(line, fault, text)
        else:
            if not_learnt:
                yield from self._column_notes(part, line, not_learnt)
            yield Row(line, name, *content, file=part.name, split=part.split)

    def table_columns(self, part: Part, line: int, columns: Collection[str]) -> tuple[list[str], list[Note]]:
        """Of a table's columns those that are read, and notes of the others.

        Raises:
            BadRowError: no row of such a table could be read.
        """
        names = self._matching(columns)
        if not names:
            raise self._unknown(columns)
        read = {_root(path, columns) for name in names for path in self._columns(name)}
        others = [column for column in columns if column not in read]
        notes = self._column_notes(part, line, self._with_near_misses(names[0], others))
        return [column for column in columns if column in read], notes

    def _shape(self, row: Mapping[str, Any], not_learnt: list[str]) -> tuple[str, str]:
        """The name of a row's form, and the names of all where it could be read as several."""
        columns = tuple(row)
        if None in row.values():
            columns = tuple(column for column in columns if row[column] is not None)
        if shape := self._shapes.get(columns):
            return shape
        names = self._matching(columns)
        is_whole = bool(names)
        name, *others = names or [self._nearest(row, columns)]
        others = [other for other in others if other != "text"]
        read = {_root(path, row) for other in (name, *others) for path in self._columns(other)}
        not_learnt += self._with_near_misses(name, [column for column in columns if column not in read])
        shape = name, ", ".join((name, *others)) if others else ""
        if is_whole and len(self._shapes) < SHAPES_KEPT:
            self._shapes[columns] = shape
        return shape

    def _matching(self, columns: Collection[str]) -> list[str]:
        return [
            name
            for name, form in self._forms.items()
            if all(_root(path, columns) in columns for path in form.required)
        ]

    def _nearest(self, row: Mapping[str, Any], columns: Collection[str]) -> str:
        """Of the forms that only nulls make whole the one with fewest; its reader says which is empty."""
        names = self._matching(row)
        if not names:
            raise self._unknown(row)
        return max(names, key=lambda name: sum(path in columns for path in self._forms[name].required))

    def _columns(self, name: str) -> tuple[str, ...]:
        return (*self._forms[name].required, *self._forms[name].optional)

    def _unknown(self, columns: Collection[str]) -> BadRowError:
        if MAPPED in self._forms:
            missing = [path for path in self._forms[MAPPED].required if _root(path, columns) not in columns]
            return _lacks(missing[0], columns)
        has = listed([*columns]) or "no columns"
        unknown = [column for column in columns if column not in KNOWN_COLUMNS]
        near = next(filter(None, (near_miss(column, KNOWN_COLUMNS) for column in unknown)), "")
        forms = "; ".join(FORMATS)
        cure = f"use one of: {forms}; or name its columns in data.mapping"
        return BadRowError("format", f"has {has}, which is no known form{near}; {cure}")

    def _with_near_misses(self, name: str, columns: list[str]) -> list[str]:
        return [shown(column) + near_miss(column, self._forms[name].optional) for column in columns]

    def _column_notes(self, part: Part, line: int, columns: list[str]) -> list[Note]:
        """A note of each column that had none."""
        new = [column for column in dict.fromkeys(columns) if column not in self._noted]
        self._noted.update(new)
        return [part.note(line, "column", column) for column in new]


def _check_speakers(messages: Messages) -> None:
    roles = [turn["role"] for turn in messages]
    if "user" not in roles:
        raise BadRowError("no_user_turn", "has no user turn; add one or remove the row")
    if "assistant" not in roles:
        raise BadRowError("no_answer", "has no assistant turn; add one or remove the row")


def _from_messages(row: Mapping[str, Any], not_learnt: list[str]) -> Content:
    turns = read_turns(row["messages"], "messages", MESSAGES, not_learnt)
    return Content(turns, tools=read_tools(row.get("tools"), "tools"))


def _from_conversations(row: Mapping[str, Any], not_learnt: list[str]) -> Content:
    turns = read_turns(row["conversations"], "conversations", CONVERSATIONS, not_learnt)
    turns = _with_system(row.get("system"), "system", turns)
    return Content(turns, tools=read_tools(row.get("tools"), "tools"))


def _from_instruction(row: Mapping[str, Any], not_learnt: list[str]) -> Content:
    parts = [_optional_text(row.get(column), column) for column in ("instruction", "input")]
    question = _filled("\n\n".join(filter(None, parts)), "instruction")
    return Content(_exchange(question, _filled(row["output"], "output")))


def _from_pair(question: str, answer: str) -> Callable[[Mapping[str, Any], list[str]], Content]:
    def read(row: Mapping[str, Any], not_learnt: list[str]) -> Content:
        turns = [
            *_side(row[question], question, "user", MESSAGES, not_learnt),
            *_side(row[answer], answer, "assistant", MESSAGES, not_learnt),
        ]
        return Content(turns, tools=read_tools(row.get("tools"), "tools"))

    return read


def _from_text(row: Mapping[str, Any], not_learnt: list[str]) -> Content:
    return Content([], _filled(row["text"], "text"))


def _mapped_form(mapping: MappingSettings) -> Form:
    """The one form of a mapping: every column it names has to be there, and may be empty."""
    style = TurnStyle(
        (mapping.role,) if mapping.role else ("role", "from"),
        (mapping.content,) if mapping.content else ("content", "value"),
        SHAREGPT_ROLES,
    )
    given = mapping.model_dump(exclude={"role", "content"}, exclude_none=True)

    def read(row: Mapping[str, Any], not_learnt: list[str]) -> Content:
        values = {setting: _look_up(row, path) for setting, path in given.items()}
        if mapping.text is not None:
            return Content([], _filled(values["text"], mapping.text))
        if mapping.messages is not None:
            turns = read_turns(values["messages"], mapping.messages, style, not_learnt)
        else:
            prompt, completion = str(mapping.prompt), str(mapping.completion)
            turns = _side(values["prompt"], prompt, "user", style, not_learnt)
            if more := _optional_text(values.get("input"), str(mapping.input)):
                turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n\n{more}"}
            turns += _side(values["completion"], completion, "assistant", style, not_learnt)
        turns = _with_system(values.get("system"), str(mapping.system), turns)
        return Content(turns, tools=read_tools(values.get("tools"), str(mapping.tools)))

    return Form(tuple(given.values()), (), read)


def _root(path: str, columns: Collection[str]) -> str:
    """The column a dotted path begins in; a column may itself be named with a dot."""
    return path if path in columns else path.split(".")[0]


def _look_up(row: Mapping[str, Any], path: str) -> Any:
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or key not in value:
            raise _lacks(path, value if isinstance(value, dict) else ())
        value = value[key]
    return value


def _lacks(path: str, columns: Collection[str]) -> BadRowError:
    last = path.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(last, columns, n=1, cutoff=0) or [""]
    nearest = f"the nearest there is '{shown(close[0])}'" if close[0] else "there is none like it"
    return BadRowError("format", f"lacks '{path}', which data.mapping names; {nearest}")


def _side(value: Any, column: str, role: str, style: TurnStyle, not_learnt: list[str]) -> Messages:
    """The turns of one side of a pair: a text of its role, or a list of turns, as TRL writes them."""
    if isinstance(value, list):
        return read_turns(value, column, style, not_learnt)
    return [{"role": role, "content": _filled(value, column)}]


def _with_system(value: Any, column: str, turns: Messages) -> Messages:
    text = _optional_text(value, column)
    if not text or any(turn["role"] == "system" for turn in turns):
        return turns
    return [{"role": "system", "content": text}, *turns]


def _exchange(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _optional_text(value: Any, column: str) -> str:
    return "" if value is None else read_text(value, f"'{column}'")


def _filled(value: Any, column: str) -> str:
    if is_empty(text := _optional_text(value, column)):
        raise BadRowError("empty", f"has an empty '{column}'; fill it or remove the row")
    return text


ROW = "an object {…}; a file that is one list of rows has to end in .json"

FORMATS = {
    "messages": Form(("messages",), ("tools",), _from_messages),
    "conversations": Form(("conversations",), ("system", "tools"), _from_conversations),
    "instruction+output": Form(("instruction", "output"), ("input",), _from_instruction),
    "prompt+completion": Form(("prompt", "completion"), ("tools",), _from_pair("prompt", "completion")),
    "prompt+response": Form(("prompt", "response"), ("tools",), _from_pair("prompt", "response")),
    "question+answer": Form(("question", "answer"), ("tools",), _from_pair("question", "answer")),
    "text": Form(("text",), (), _from_text),
}
"""Every form, in the order of precedence where a row has the columns of several."""

KNOWN_COLUMNS = tuple({column: None for form in FORMATS.values() for column in form.required})
