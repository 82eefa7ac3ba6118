"""Every form of row is known by its keys, and every bad row is named with its line and its cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.config import DataSettings
from tasks.errors import InputError
from tasks.prepare.jsonl import read_jsonl
from tasks.prepare.rows import Row
from tasks.prepare.sources import check_source, source_inputs

GOOD = b'{"prompt": "a", "completion": "b"}'
SURROGATE = b'{"prompt": "a", "completion": "\\ud800"}'


def read(path: Path, content: bytes | list[Any]) -> list[Row]:
    if isinstance(content, list):
        content = "\n".join(json.dumps(row) for row in content).encode()
    path.write_bytes(content)
    return list(read_jsonl(path))


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
        ({"prompt": "a", "completion": "b"}, "prompt+completion"),
        ({"prompt": "a", "response": "b"}, "prompt+response"),
        ({"question": "a", "answer": "b"}, "question+answer"),
        ({"instruction": "a", "output": "b"}, "instruction+output"),
        ({"instruction": "a", "input": "", "output": "b"}, "instruction+output"),
    ],
)
def test_each_form_becomes_the_same_conversation(tmp_path: Path, row: dict[str, Any], form: str) -> None:
    [read_row] = read(tmp_path / "rows.jsonl", [row])
    assert read_row.format == form
    assert read_row.messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_forms_may_change_from_row_to_row(tmp_path: Path) -> None:
    rows = read(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}, {"question": "a", "answer": "b"}])
    assert [row.format for row in rows] == ["prompt+response", "question+answer"]


def test_an_input_follows_its_instruction(tmp_path: Path) -> None:
    [row] = read(tmp_path / "rows.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}])
    assert row.messages[0]["content"] == "Add.\n\n1 2"


def test_bom_crlf_and_blank_lines_are_taken_and_lines_counted(tmp_path: Path) -> None:
    content = (
        b"\xef\xbb\xbf"
        + GOOD
        + b"\r\n\r\n  \n"
        + GOOD
        + b"\n"
        + b'{"prompt": "\xe2\x80\xa8", "completion": "b"}'
    )
    with pytest.raises(InputError, match=r"line 5: has an empty text of turn 1"):
        read(tmp_path / "rows.jsonl", content)
    assert [row.line for row in read(tmp_path / "rows.jsonl", content[: content.rindex(b"\n")])] == [1, 4]


def turns(*pairs: tuple[Any, Any]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in pairs]}).encode()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"prompt": "a", ', "not JSON at column 17"),
        (b"\xff\xfe{", "not UTF-8 at byte 1"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "not JSON at column 1"),
        (b"[1]", "is a list, not an object"),
        (b"{}", "has no keys, which is no known form; use one of: messages; prompt\\+completion"),
        (b'{"text": "a"}', "has 'text', which is no known form"),
        (
            b'{"prompt": "a", "completion": "b", "id": 1}',
            "the unknown key 'id'; a 'prompt\\+completion' row takes",
        ),
        (b'{"instruction": "a", "output": "b", "inputs": "c"}', "did you mean 'input'"),
        (b'{"prompt": 1, "completion": "b"}', "'prompt' is a number; give a string"),
        (b'{"prompt": "a", "completion": null}', "'completion' is a null; give a string"),
        (b'{"prompt": NaN, "completion": "b"}', "has NaN"),
        (b'{"prompt": -Infinity, "completion": "b"}', "has -Infinity"),
        (b'{"prompt": "a", "prompt": "c", "completion": "b"}', "has the key 'prompt' twice"),
        (b'{"prompt": "a", "completion": " "}', "has an empty text of turn 2 \\(assistant\\)"),
        (SURROGATE, "half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
        (b'{"messages": "a"}', "'messages' is a string; give a list"),
        (b'{"messages": []}', "has no user turn"),
        (b'{"messages": ["a"]}', "turn 1 is a string"),
        (b'{"messages": [{"role": "user"}]}', "turn 1 lacks 'content'"),
        (
            b'{"messages": [{"role": "user", "content": "a", "name": "b"}]}',
            "turn 1 has the unknown key 'name'",
        ),
        (turns(("user", "a")), "has no assistant turn"),
        (turns(("assistant", "a")), "has no user turn"),
        (turns(("human", "a"), ("assistant", "b")), "turn 1 has the unknown role 'human'; use one of system"),
        (turns((["user"], "a"), ("assistant", "b")), "turn 1 has the unknown role"),
        (turns(("user", "a"), ("assistant", ["b"])), "'content' of turn 2 is a list"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, line: bytes, fault: str) -> None:
    with pytest.raises(InputError, match=rf"rows\.jsonl, line 2: .*{fault}"):
        read(tmp_path / "rows.jsonl", GOOD + b"\n" + line + b"\n" + GOOD)


def test_all_bad_rows_are_counted_and_ten_are_shown(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        read(tmp_path / "rows.jsonl", b"\n".join([b"x"] * 12 + [GOOD]))
    lines = str(raised.value).splitlines()
    assert len(lines) == 11
    assert lines[-1].endswith("and 2 more bad rows")


def test_a_source_is_checked_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    faults = {
        "stdlab": r"no such file or built-in dataset; did you mean 'stdlib'\?",
        "nothing-like-it": r"give a \.jsonl file, or the built-in stdlib",
        str(tmp_path / "row.jsonl"): r"no such file .*; did you mean '.*rows\.jsonl'",
        str(tmp_path): r"is a folder; give a file",
        str(tmp_path / "empty.jsonl"): "is empty",
        str(tmp_path / "rows.csv"): r"'\.csv' files are not taken; give one that ends in \.jsonl",
        "/dev/null.jsonl/x": "no such file",
    }
    for source, fault in faults.items():
        with pytest.raises(InputError, match=fault):
            check_source(DataSettings(source=source))
    check_source(DataSettings(source=str(tmp_path / "rows.jsonl")))
    check_source(DataSettings(source="stdlib"))


def test_a_source_is_known_by_its_content_not_its_name(tmp_path: Path) -> None:
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_bytes(GOOD)
    one = source_inputs(str(tmp_path / "one.jsonl"))
    assert one == source_inputs(str(tmp_path / "two.jsonl"))
    (tmp_path / "two.jsonl").write_bytes(GOOD + b"\n" + GOOD)
    assert one != source_inputs(str(tmp_path / "two.jsonl"))
    assert "python" in source_inputs("stdlib")
