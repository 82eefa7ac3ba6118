"""Every form of row is known by its columns, or named in `data.mapping`; what is not learnt is noted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.config import DataSettings, MappingSettings
from tasks.prepare.formats import FORMATS, MAPPED, Forms
from tasks.prepare.rows import Note, Row, Unused
from tasks.prepare.sources import read_source
from tasks.prepare.turns import SHAREGPT_ROLES

ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def read(
    folder: Path, *rows: Any, **mapping: str
) -> tuple[list[Row], list[tuple[int, str, str]], list[tuple[int, str, str]]]:
    """The rows, and (line, kind, detail) of the faults and of the notes."""
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [*read_source(DataSettings(source=str(source), mapping=MappingSettings(**mapping)))]
    return (
        [item for item in items if isinstance(item, Row)],
        [(item.line, item.kind, item.detail) for item in items if isinstance(item, Unused)],
        [(item.line, item.kind, item.detail) for item in items if isinstance(item, Note)],
    )


def one(folder: Path, row: Any, **mapping: str) -> Row:
    """The one row there is, with neither faults nor notes."""
    [read_row], faults, notes = read(folder, row, **mapping)
    assert not faults + notes
    return read_row


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": ASKED}, "messages"),
        ({"messages": json.dumps(ASKED)}, "messages"),
        ({"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in ASKED]},
         "messages"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
         "conversations"),
        ({"conversations": ASKED}, "conversations"),
        ({"instruction": "a", "output": "b"}, "instruction+output"),
        ({"instruction": "a", "input": "", "output": "b"}, "instruction+output"),
        ({"instruction": "a", "input": None, "output": "b"}, "instruction+output"),
        ({"instruction": "", "input": "a", "output": "b"}, "instruction+output"),
        ({"prompt": "a", "completion": "b"}, "prompt+completion"),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, "prompt+completion"),
        ({"prompt": ASKED[:1], "completion": "b"}, "prompt+completion"),
        ({"prompt": "a", "response": "b"}, "prompt+response"),
        ({"prompt": ASKED[:1], "response": ASKED[1:]}, "prompt+response"),
        ({"question": "a", "answer": "b"}, "question+answer"),
        ({"question": "a", "answer": "b", "messages": None, "text": None}, "question+answer"),
    ],
)  # fmt: skip
def test_each_form_becomes_the_same_conversation(tmp_path: Path, row: dict[str, Any], form: str) -> None:
    assert one(tmp_path, row) == Row(1, form, ASKED)
    assert form in FORMATS


def test_a_text_is_learnt_whole(tmp_path: Path) -> None:
    assert one(tmp_path, {"text": " a\n"}) == Row(1, "text", [], " a\n")


def test_forms_may_change_from_row_to_row(tmp_path: Path) -> None:
    rows, _, _ = read(
        tmp_path, {"prompt": "a", "response": "b"}, {"question": "a", "answer": "b"}, {"text": "a"}
    )
    assert [row.format for row in rows] == ["prompt+response", "question+answer", "text"]


def test_an_input_follows_its_instruction(tmp_path: Path) -> None:
    row = one(tmp_path, {"instruction": "Add.", "input": "1 2", "output": "3"})
    assert row.messages[0]["content"] == "Add.\n\n1 2"


def test_text_is_kept_as_it_is_written(tmp_path: Path) -> None:
    text = "  naïve \U0001f600\r\n\t\u2028\u0085 \ufeff "
    assert one(tmp_path, {"prompt": text, "completion": text}).messages[1]["content"] == text


@pytest.mark.parametrize(("word", "role"), SHAREGPT_ROLES.items())
def test_sharegpt_words_are_roles(tmp_path: Path, word: str, role: str) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": word, "value": "c"}]
    assert one(tmp_path, {"conversations": turns}).messages[2] == {"role": role, "content": "c"}


def test_a_row_s_system_prompt_opens_a_conversation_that_has_none(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    system = {"role": "system", "content": "Be kind."}
    assert one(tmp_path, {"system": "Be kind.", "conversations": turns}).messages == [system, *ASKED]
    assert one(tmp_path, {"system": "", "conversations": turns}).messages == ASKED
    own = [{"from": "system", "value": "Be brief."}, *turns]
    assert one(tmp_path, {"system": "Be kind.", "conversations": own}).messages[0]["content"] == "Be brief."


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": {"name": "add", "arguments": {"a": 1}}},
        {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
        {"name": "add", "arguments": {"a": 1}},
    ],
)
@pytest.mark.parametrize("content", [None, "", []])
def test_tool_calls_become_what_templates_take(tmp_path: Path, call: Any, content: Any) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "b", "tool_calls": None, "name": None},
    ]
    assert one(tmp_path, {"messages": turns}).messages == [
        ASKED[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "", "tool_call_id": "c1", "name": "add"},
        ASKED[1],
    ]


def test_a_tool_call_keeps_its_id_and_arguments_that_are_no_object(tmp_path: Path) -> None:
    calls = [
        {"id": "c1", "function": {"name": "f", "arguments": "not JSON"}},
        {"function": {"name": "f", "arguments": "{not JSON"}},
        {"function": {"name": "f"}},
    ]
    turns = [ASKED[0], {"role": "assistant", "content": "b", "tool_calls": calls}]
    read_calls = one(tmp_path, {"messages": turns}).messages[1]["tool_calls"]
    assert read_calls[0] == {
        "id": "c1",
        "type": "function",
        "function": {"name": "f", "arguments": "not JSON"},
    }
    assert [call["function"]["arguments"] for call in read_calls[1:]] == ["{not JSON", {}]


@pytest.mark.parametrize(
    ("value", "calls"),
    [
        ('{"name": "add", "arguments": {"a": 1}}', [CALL]),
        ('{"name": "add", "arguments": "{\\"a\\": 1}"}', [CALL]),
        ('[{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 1}}]', [CALL, CALL]),
        ('{"name": "add"}', None),
        ("add 1", None),
        ("[]", None),
        ("3", None),
    ],
)
def test_a_function_call_turn_is_a_tool_call_if_it_is_one(tmp_path: Path, value: str, calls: Any) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": value}]
    turn = one(tmp_path, {"conversations": turns}).messages[1]
    assert turn == (
        {"role": "assistant", "content": "", "tool_calls": calls}
        if calls
        else {"role": "assistant", "content": value}
    )


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"default": None}}}


@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], json.dumps([TOOL["function"]])])
@pytest.mark.parametrize(
    "row", [{"messages": ASKED}, {"conversations": ASKED}, {"prompt": ASKED[:1], "completion": ASKED[1:]}]
)
def test_a_row_s_tools_become_what_templates_take(tmp_path: Path, tools: Any, row: dict[str, Any]) -> None:
    assert one(tmp_path, {**row, "tools": tools}).tools == [TOOL]


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools_are_none(tmp_path: Path, tools: Any) -> None:
    assert one(tmp_path, {"messages": ASKED, "tools": tools}).tools is None


def test_columns_that_are_not_learnt_are_noted_once(tmp_path: Path) -> None:
    pair = {"prompt": "a", "completion": "b"}
    rows, faults, notes = read(
        tmp_path,
        {**pair, "id": 1},
        {"source": "x", **pair, "id": 2},
        {"instruction": "a", "output": "b", "imput": "c"},
        {"messages": [{**ASKED[0], "weight": 0}, {**ASKED[1], "weight": 1, "tool_call": []}]},
        {"messages": [{**turn, "weight": 0} for turn in ASKED], "tool": [], "id": 3},
        {**pair, "a\nb": 1, "x" * 99: 1},
    )
    assert (len(rows), faults) == (6, [])
    assert notes == [
        (1, "column", "id"),
        (2, "column", "source"),
        (3, "column", "imput (did you mean 'input'?)"),
        (4, "column", "messages.weight"),
        (4, "column", "messages.tool_call (did you mean 'tool_calls'?)"),
        (5, "column", "tool (did you mean 'tools'?)"),
        (6, "column", "a\\nb"),
        (6, "column", "x" * 60 + "…"),
    ]


def test_columns_of_a_bad_row_are_noted_too(tmp_path: Path) -> None:
    _, [fault], notes = read(tmp_path, {"messages": [{**ASKED[0], "weight": 0}], "id": 1})
    assert fault[1] == "no_answer"
    assert [detail for _, _, detail in notes] == ["id", "messages.weight"]


def test_ever_new_columns_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.prepare.formats.SHAPES_KEPT", 3)
    forms = Forms(MappingSettings())
    for number in range(9):
        forms._shape({"text": "a", f"column {number}": 1}, [])
    assert len(forms._shapes) == 3


@pytest.mark.parametrize(
    ("row", "form", "others"),
    [
        ({"messages": ASKED, "prompt": "x", "completion": "y"}, "messages", "messages, prompt+completion"),
        ({"conversations": ASKED, "messages": ASKED}, "messages", "messages, conversations"),
        ({"prompt": "a", "completion": "b", "response": "y"}, "prompt+completion",
         "prompt+completion, prompt+response"),
        ({"instruction": "a", "input": "", "output": "b", "question": "x", "answer": "y", "text": "z"},
         "instruction+output", "instruction+output, question+answer"),
    ],
)  # fmt: skip
def test_of_several_forms_the_first_is_taken_and_it_is_said(
    tmp_path: Path, row: dict[str, Any], form: str, others: str
) -> None:
    [read_row], [], notes = read(tmp_path, row)
    assert (read_row.format, read_row.messages) == (form, ASKED)
    assert (1, "two_forms", others) in notes
    assert {detail for _, kind, detail in notes if kind == "column"} == {"text"} & row.keys()


def test_a_text_beside_another_form_is_only_a_column(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "input": "", "output": "b", "text": "a b"}] * 2
    assert read(tmp_path, *rows)[2] == [(1, "column", "text")]


def test_the_forms_stand_in_their_order_of_precedence() -> None:
    first = {name.split("+")[0]: None for name in FORMATS}
    assert [*first] == ["messages", "conversations", "instruction", "prompt", "question", "text"]


@pytest.mark.parametrize(
    ("row", "kind", "detail"),
    [
        ([1], "type", "is a list; a row has to be an object"),
        ({"promt": "a", "completion": "b"}, "format", "(did you mean 'prompt'?); use one of: messages; conv"),
        ({"prompt": "a"}, "format", "has 'prompt', which is no known form; use one of"),
        ({}, "format", "has no columns, which is no known form"),
        ({"prompt": "a", "completion": None}, "empty", "has an empty 'completion'; fill it or remove"),
        ({"question": "a", "answer": None, "prompt": None, "completion": None}, "empty", "an empty 'answer'"),
        ({"prompt": 1, "completion": "b"}, "type", "'prompt' is a number; give a string"),
        ({"messages": "a"}, "type", "'messages' is a string; give a list"),
        ({"messages": "[1"}, "json", "'messages' not JSON at column 3"),
        ({"messages": ["a"]}, "type", "turn 1 of 'messages' is a string; give an object"),
        ({"messages": [{"role": "human", "content": "a"}]}, "role",
         "turn 1 of 'messages' has the unknown role 'human'; use one of system, user, assistant, tool, or "
         "set data.mapping.messages"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": 5}]}, "type",
         "the 'content' of turn 2 of 'messages' (assistant) is a number"),
        ({"messages": [ASKED[0], {"role": "assistant"}]}, "empty",
         "turn 2 of 'messages' (assistant) has an empty 'content'"),
        ({"prompt": ASKED[:1], "completion": [{"role": "assistant", "content": ""}]}, "empty",
         "turn 1 of 'completion' (assistant)"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "type",
         "has a part that is one of type 'image'; each part has to be"),
    ],
)  # fmt: skip
def test_a_fault_says_what_is_wrong_and_what_to_do(tmp_path: Path, row: Any, kind: str, detail: str) -> None:
    [], [fault], _ = read(tmp_path, row)
    assert fault[:2] == (1, kind)
    assert detail in fault[2]


def test_a_column_that_is_null_and_one_that_is_not_there_are_told_apart(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": None}, {"prompt": "a"}, {"prompt": "a", "completion": None}]
    assert [kind for _, kind, _ in read(tmp_path, *rows)[1]] == ["empty", "format", "empty"]


def test_many_and_long_columns_make_no_long_message(tmp_path: Path) -> None:
    _, [(_, _, detail)], _ = read(tmp_path, {f"{number}{'x' * 1000}": 1 for number in range(1000)})
    assert len(detail) < 1200


@pytest.mark.parametrize(
    ("mapping", "row"),
    [
        ({"prompt": "q", "completion": "a"}, {"q": "a", "a": "b", "text": "z"}),
        ({"prompt": "turn.q", "completion": "turn.reply.text"}, {"turn": {"q": "a", "reply": {"text": "b"}}}),
        ({"prompt": "turn.q", "completion": "a"}, {"turn.q": "a", "turn": {"q": "x"}, "a": "b"}),
        ({"prompt": "messages", "completion": "a"}, {"messages": "a", "a": "b"}),
        ({"prompt": "q", "input": "i", "completion": "a"}, {"q": "a", "i": "", "a": "b"}),
        ({"prompt": "q", "input": "i", "completion": "a"}, {"q": "a", "i": None, "a": "b"}),
        ({"prompt": "q", "completion": "a"}, {"q": ASKED[:1], "a": ASKED[1:]}),
        ({"messages": "chat"}, {"chat": ASKED}),
        ({"messages": "chat"}, {"chat": [{"from": "human", "value": "a"}, {"from": "model", "value": "b"}]}),
        ({"messages": "data.chat", "role": "who", "content": "what"},
         {"data": {"chat": json.dumps([{"who": "human", "what": "a"}, {"who": "bot", "what": "b"}])}}),
        ({"messages": "chat", "system": "s", "tools": "t"}, {"chat": ASKED, "s": None, "t": None}),
    ],
)  # fmt: skip
def test_a_mapping_names_the_columns_and_overrides_every_form(
    tmp_path: Path, mapping: dict[str, str], row: dict[str, Any]
) -> None:
    [read_row], faults, notes = read(tmp_path, row, **mapping)
    assert read_row == Row(1, MAPPED, ASKED)
    assert not faults
    used = {path if path in row else path.split(".")[0] for path in mapping.values()}
    assert [detail for _, _, detail in notes] == [column for column in row if column not in used]


def test_a_mapping_takes_texts_inputs_system_prompts_and_tools(tmp_path: Path) -> None:
    assert one(tmp_path, {"body": "a"}, text="body") == Row(1, MAPPED, [], "a")
    row = one(
        tmp_path,
        {"q": "a", "more": "x", "a": "b", "s": "Be kind.", "t": [TOOL]},
        prompt="q", input="more", completion="a", system="s", tools="t",
    )  # fmt: skip
    assert [turn["content"] for turn in row.messages] == ["Be kind.", "a\n\nx", "b"]
    assert row.tools == [TOOL]


@pytest.mark.parametrize(
    ("mapping", "row", "detail"),
    [
        ({"text": "body"}, {"boddy": "a"},
         "lacks 'body', which data.mapping names; the nearest there is 'boddy'"),
        ({"text": "a.body"}, {"a": {"boddy": "a"}},
         "lacks 'a.body', which data.mapping names; the nearest there is 'boddy'"),
        ({"text": "a.body"}, {"a": "x"}, "lacks 'a.body', which data.mapping names; there is none like it"),
        ({"text": "body"}, {}, "lacks 'body', which data.mapping names; there is none like it"),
        ({"prompt": "q", "completion": "a", "system": "sys"}, {"q": "a", "a": "b", "sis": "c"},
         "lacks 'sys', which data.mapping names; the nearest there is 'sis'"),
    ],
)  # fmt: skip
def test_a_row_without_a_mapped_column_is_told_with_the_nearest(
    tmp_path: Path, mapping: dict[str, str], row: dict[str, Any], detail: str
) -> None:
    assert read(tmp_path, row, **mapping)[1] == [(1, "format", detail)]


@pytest.mark.parametrize(
    ("mapping", "row", "kind"),
    [
        ({"text": "body"}, {"body": ""}, "empty"),
        ({"text": "a.body"}, {"a": None}, "empty"),
        ({"text": "body"}, {"body": 3}, "type"),
        ({"messages": "chat"}, {"chat": None}, "empty"),
        ({"messages": "chat"}, {"chat": ASKED[:1]}, "no_answer"),
        ({"messages": "chat"}, {"chat": [{"role": "critic", "content": "a"}]}, "role"),
        ({"messages": "chat", "role": "who"}, {"chat": ASKED}, "role"),
        ({"prompt": "q", "completion": "a"}, {"q": "a", "a": " "}, "empty"),
    ],
)
def test_mapped_rows_are_held_to_the_same_checks(
    tmp_path: Path, mapping: dict[str, str], row: dict[str, Any], kind: str
) -> None:
    assert [fault[1] for fault in read(tmp_path, row, **mapping)[1]] == [kind]


def test_equal_content_is_known_as_equal_in_whatever_form(tmp_path: Path) -> None:
    rows, _, _ = read(
        tmp_path,
        {"prompt": "a", "completion": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    )
    assert rows[0].identity == rows[1].identity
