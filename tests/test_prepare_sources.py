"""Every kind of source gives the same rows; its splits are kept; it is known by its content."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tasks.config import DataSettings, MappingSettings
from tasks.errors import InputError
from tasks.prepare.files import split_of
from tasks.prepare.formats import FORMATS, Forms
from tasks.prepare.hub import hub_inputs, read_hub
from tasks.prepare.rows import Messages, Note, Row
from tasks.prepare.sources import READERS, check_source, read_source, source_inputs
from tasks.prepare.strict_json import StrictJson

GOOD = b'{"prompt": "a", "completion": "b"}\n'


def data(source: Path | str, **more: Any) -> DataSettings:
    return DataSettings(source=str(source), **more)


def read(source: Path | str, **more: Any) -> list[Row]:
    """The rows of a source in which nothing is wrong or odd."""
    check_source(data(source, **more))
    items = [*read_source(data(source, **more))]
    assert all(isinstance(item, Row) for item in items), items
    return [item for item in items if isinstance(item, Row)]


def folder_of(folder: Path, *names: str) -> Path:
    """Files of one row each, which says its file's name."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(json.dumps({"prompt": name, "completion": "b"}))
    return folder


# Written in any form and file, a chat is read as the same chat.

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    lambda text: not text.isspace()
)
ARGUMENTS = st.dictionaries(TEXT, st.none() | st.integers() | TEXT | st.lists(st.booleans()), max_size=2)
CALLS = st.lists(
    st.builds(
        lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
        TEXT,
        ARGUMENTS,
    ),
    min_size=1,
    max_size=2,
)
TURNS = st.lists(
    st.one_of(
        st.builds(lambda text: {"role": "user", "content": text}, TEXT),
        st.builds(lambda text: {"role": "assistant", "content": text}, TEXT),
        st.builds(lambda calls: {"role": "assistant", "content": "", "tool_calls": calls}, CALLS),
        st.builds(
            lambda text, name: {"role": "tool", "content": text, "name": name}, st.just("") | TEXT, TEXT
        ),
    ),
    max_size=3,
)
PAIRS = st.builds(
    lambda a, b: [{"role": "user", "content": a}, {"role": "assistant", "content": b}], TEXT, TEXT
)
CHATS = {
    "messages": st.builds(lambda pair, turns: pair + turns, PAIRS, TURNS),
    "conversations": st.builds(
        lambda system, pair: [{"role": "system", "content": system}, *pair], TEXT, PAIRS
    ),
}


def written(form: str, chat: Messages) -> dict[str, Any]:
    """A chat as a row of a form, with tool call arguments as a string of JSON."""
    first, *_, last = [turn["content"] for turn in chat]
    if form == "messages":
        return {"messages": [_with_written_calls(turn) for turn in chat]}
    if form == "conversations":
        words = {"user": "human", "assistant": "gpt"}
        turns = [{"from": words[turn["role"]], "value": turn["content"]} for turn in chat[1:]]
        return {"conversations": turns, "system": first}
    if form == "text":
        return {"text": first}
    return dict(zip(form.split("+"), (first, last), strict=True))


def _with_written_calls(turn: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in turn.get("tool_calls", [])
    ]
    return {**turn, "content": None, "tool_calls": calls} if calls else turn


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=len(rows) % 3 or None).encode()


def as_table(delimiter: str) -> Callable[[list[dict[str, Any]]], bytes]:
    def write(rows: list[dict[str, Any]]) -> bytes:
        cells = [
            {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
            for row in rows
        ]
        file = io.StringIO()
        table = csv.DictWriter(
            file, [*rows[0]], delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL
        )
        table.writeheader()
        table.writerows(cells)
        return file.getvalue().encode()

    return write


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    return file.getvalue()


CONTAINERS = {
    "rows.jsonl": as_jsonl,
    "rows.ndjson": as_jsonl,
    "rows.json": as_json,
    "lines.json": as_jsonl,
    "rows.csv": as_table(","),
    "semicolons.csv": as_table(";"),
    "rows.tsv": as_table("\t"),
    "rows.parquet": as_parquet,
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("form", FORMATS)
@given(st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_chat_is_the_same_in_whatever_it_was_written(name: str, form: str, draw: st.DataObject) -> None:
    chats = draw.draw(st.lists(CHATS.get(form, PAIRS), min_size=1, max_size=4), "chats")
    compression = draw.draw(st.sampled_from([*COMPRESSIONS]), "compression")
    content = CONTAINERS[name]([written(form, chat) for chat in chats])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / (name + compression)
        source.write_bytes(COMPRESSIONS[compression](content))
        rows = read(source)
    assert {row.format for row in rows} == {form}
    if form == "text":
        assert [(row.messages, row.text) for row in rows] == [([], chat[0]["content"]) for chat in chats]
    else:
        assert [row.messages for row in rows] == chats


LINE = TEXT.filter(lambda text: not any(mark in text for mark in "\r\n") and text[0] != "\ufeff")


@given(st.lists(st.tuples(LINE, LINE)), st.sampled_from([*COMPRESSIONS]))
@settings(deadline=None)
def test_pairs_of_lines_are_read_as_they_stand(pairs: list[tuple[str, str]], compression: str) -> None:
    content = COMPRESSIONS[compression]("\n".join(f"{a}\n{b}\n" for a, b in pairs).encode())
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"pairs.txt{compression}"
        source.write_bytes(content)
        rows = [item for item in read_source(data(source)) if isinstance(item, Row)]
    assert [tuple(turn["content"] for turn in row.messages) for row in rows] == pairs
    assert [row.line for row in rows] == [3 * index + 1 for index in range(len(pairs))]


def test_a_large_element_is_parsed_from_a_window_that_grows_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse_at, attempts = StrictJson.parse_at, 0

    def counted(json_text: StrictJson, text: str, start: int) -> tuple[Any, int]:
        nonlocal attempts
        attempts += 1
        return parse_at(json_text, text, start)

    monkeypatch.setattr(StrictJson, "parse_at", counted)
    rows = [{"prompt": "a", "completion": f'\\ " \U0001f600 {"é" * size}'} for size in (0, 3_000_000, 70_000)]
    for name, compress in COMPRESSIONS.items():
        source = tmp_path / f"rows.json{name}"
        source.write_bytes(compress(json.dumps(rows, ensure_ascii=False).encode()))
        assert [row.messages[1]["content"] for row in read(source)] == [row["completion"] for row in rows]
    assert attempts < 3 * 20


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 64])
def test_an_array_is_the_same_wherever_its_window_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr("tasks.prepare.json_array.CHUNK_BYTES", chunk_bytes)
    row = '{"prompt": "\\ud83d\\ude00 \\\\ é", "n": [-12.5e-3, true, null, 123], "completion": "b"}'
    deep = "[" * 5000 + '"]\\\\\\""' + "]" * 5000
    source = tmp_path / "rows.json"
    source.write_text(f"\r\n[ 123456 , {row} ,\r\n{row}\r\n, {deep}, {row}\r\n]", newline="")
    items = [*read_source(data(source))]
    assert [(item.line, getattr(item, "kind", "row")) for item in items] == [
        (2, "type"), (2, "column"), (2, "row"), (3, "row"), (4, "nested"), (4, "row"), (1, "crlf"),
    ]  # fmt: skip
    assert items[2].messages[0]["content"] == "\U0001f600 \\ é"  # type: ignore[union-attr]


def test_cells_of_a_windows_file_have_plain_line_ends_and_others_keep_theirs(tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    for end, text in (("\r\n", "a\nb"), ("\n", "a\r\nb")):
        source.write_bytes(f'text{end}"a\r\nb"{end}'.encode())
        assert [item.text for item in read_source(data(source)) if isinstance(item, Row)] == [text]


def test_a_parquet_file_is_read_batch_by_batch_and_only_where_it_is_learnt(tmp_path: Path) -> None:
    source = tmp_path / "rows.parquet"
    rows = [{"prompt": f"a{i}", "completion": "b", "image": b"\xff" * 9, "id": i} for i in range(1000)]
    parquet.write_table(pa.Table.from_pylist(rows), source, row_group_size=300)
    image, number, *items = read_source(data(source))
    assert [image, number] == [Note("", 1, "column", "image"), Note("", 1, "column", "id")]
    assert [(item.line, item.messages[0]["content"]) for item in items if isinstance(item, Row)] == [
        (i + 1, f"a{i}") for i in range(1000)
    ]


def test_a_null_in_a_parquet_file_is_a_value_that_is_not_there(tmp_path: Path) -> None:
    tools = [{"name": "f", "parameters": {"a": {"type": "string"}}}, {"name": "g", "parameters": {"b": [1]}}]
    call = {"function": {"name": "f", "arguments": {"a": "x"}}}
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call, {"function": {"name": "g", "arguments": {"b": 1}}}]},
    ]
    source = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist([{"messages": chat, "tools": tools}]), source)
    [row] = read(source)
    assert [tool["function"] for tool in row.tools or []] == tools
    assert [one["function"]["arguments"] for one in row.messages[1]["tool_calls"]] == [{"a": "x"}, {"b": 1}]
    assert row.messages[0] == chat[0]


# What can be said before anything is read.


def test_a_source_is_checked_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.xlsx").write_text("a,b")
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    (tmp_path / "none").mkdir()
    (tmp_path / "outer" / "data").mkdir(parents=True)
    (tmp_path / "outer" / "data" / "rows.jsonl").write_bytes(GOOD)
    faults = {
        "stdlab": r"no such file, folder or built-in dataset; did you mean 'stdlib'\?",
        "nothing-like-it": r"give a file that ends in \.jsonl, .*, a hub dataset's owner/name, or 'stdlib'",
        "no-folder/rows.jsonl": "no such file",
        str(tmp_path / "row.jsonl"): r"no such file, .*; did you mean '.*/rows\.jsonl'\?",
        str(tmp_path / "none"): r"none: has no data files; they end in \.jsonl",
        str(tmp_path / "outer"): r"outer: has no data files itself, but its folder 'data' has",
        str(tmp_path / "empty.jsonl"): "is empty; put rows into it",
        str(
            tmp_path / "rows.xlsx"
        ): r"'\.xlsx' files are not taken; give one that ends in \.jsonl, .*\.gz or",
        "/dev/null": "not a regular file",
        "/dev/null/rows.jsonl": "no such file|Not a directory",
    }
    for source, fault in faults.items():
        with pytest.raises(InputError, match=fault):
            check_source(data(source))
    for source in (str(tmp_path / "rows.jsonl"), "stdlib"):
        check_source(data(source))


def test_settings_that_a_source_does_not_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    with pytest.raises(InputError, match=r"data\.subset: only hub datasets have one"):
        check_source(data(tmp_path / "rows.jsonl", subset="main"))
    with pytest.raises(InputError, match=r"data\.revision: only hub datasets have one, stdlib is none"):
        check_source(data("stdlib", revision="main"))
    with pytest.raises(InputError, match=r"data\.mapping: the rows of 'stdlib' need none"):
        check_source(data("stdlib", mapping=MappingSettings(text="body")))


def test_a_file_that_may_not_be_read_is_refused_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(InputError, match=r"rows\.jsonl: you may not read it"):
        check_source(data(tmp_path / "rows.jsonl"))


# Folders.


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("Train-00000-of-00002.parquet", "train"),
        ("train_sft", "train"),
        ("train2.json", "train"),
        ("training.jsonl", None),
        ("trains.jsonl", None),
        ("valid.csv", "valid"),
        ("validation.csv", "valid"),
        ("val.txt", "valid"),
        ("value.txt", None),
        ("dev-1.tsv", "valid"),
        ("device.tsv", None),
        ("test.jsonl.gz", "test"),
        ("testé.jsonl", None),
        ("my_test.jsonl", None),
    ],
)
def test_a_split_is_known_by_the_first_word_of_a_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_the_splits_of_a_folder_are_kept_held_out_rows_first(tmp_path: Path) -> None:
    names = ["train-2.jsonl", "train-1.json", "train-10.jsonl", "dev.jsonl", "test.jsonl"]
    others = ["extra.jsonl", "README.md", ".hidden.jsonl"]
    folder = folder_of(tmp_path / "rows", *names, *others)
    (folder / "images").mkdir()
    items = [*read_source(data(folder))]
    assert [item for item in items if isinstance(item, Note)] == [
        Note(name, 1, "file", name) for name in ("README.md", "extra.jsonl", "images")
    ]
    rows = [item for item in items if isinstance(item, Row)]
    assert [(row.split, row.file) for row in rows] == [
        ("test", "test.jsonl"),
        ("valid", "dev.jsonl"),
        ("train", "train-1.json"),
        ("train", "train-10.jsonl"),
        ("train", "train-2.jsonl"),
    ]
    assert all(row.messages[0]["content"] == row.file and row.line == 1 for row in rows)


def test_a_folder_without_splits_is_read_whole_in_the_order_of_names(tmp_path: Path) -> None:
    rows = read(folder_of(tmp_path / "rows", "b.jsonl", "a.json"))
    assert [(row.split, row.file) for row in rows] == [(None, "a.json"), (None, "b.jsonl")]


def test_a_folder_of_training_rows_only_is_split_like_one_file(tmp_path: Path) -> None:
    rows = read(folder_of(tmp_path / "rows", "train-1.jsonl", "train-2.jsonl"))
    assert [(row.split, row.file) for row in rows] == [(None, "train-1.jsonl"), (None, "train-2.jsonl")]


def test_a_file_is_named_only_where_there_are_several(tmp_path: Path) -> None:
    assert [row.file for row in read(folder_of(tmp_path / "rows", "a.jsonl"))] == [""]
    assert [row.file for row in read(tmp_path / "rows" / "a.jsonl")] == [""]


def test_held_out_rows_without_training_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has test\.jsonl, but no file whose name begins with 'train'"):
        check_source(data(folder_of(tmp_path / "rows", "test.jsonl", "rows.jsonl")))


def test_columns_are_noted_once_for_a_whole_folder(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv"):
        folder_of(tmp_path / "rows", name)
    (tmp_path / "rows" / "a.jsonl").write_text('{"text": "a", "id": 1}')
    (tmp_path / "rows" / "b.csv").write_text("text,id\nb,2\n")
    notes = [item for item in read_source(data(tmp_path / "rows")) if isinstance(item, Note)]
    assert notes == [Note("a.jsonl", 1, "column", "id")]


# What is known of a source.


def test_a_source_is_known_by_its_content_not_its_name(tmp_path: Path) -> None:
    for name in ("one.jsonl", "two.jsonl", "two.txt"):
        (tmp_path / name).write_bytes(GOOD)
    one = source_inputs(data(tmp_path / "one.jsonl"))
    assert one == source_inputs(data(tmp_path / "two.jsonl"))
    assert one != source_inputs(data(tmp_path / "two.txt"))
    (tmp_path / "two.jsonl").write_bytes(GOOD * 2)
    assert one != source_inputs(data(tmp_path / "two.jsonl"))
    assert "python" in source_inputs(data("stdlib"))
    assert json.loads(json.dumps(one)) == one


def test_a_folder_is_known_by_what_is_read_of_it(tmp_path: Path) -> None:
    here = folder_of(tmp_path / "here", "train.jsonl", "test.jsonl", "README.md")
    there = folder_of(tmp_path / "there", "train.jsonl", "test.jsonl", "README.md")
    (there / "README.md").write_text("another text")
    assert source_inputs(data(here)) == source_inputs(data(there))
    (there / "test.jsonl").rename(there / "valid.jsonl")
    assert source_inputs(data(here)) != source_inputs(data(there))


def test_the_built_in_rows_carry_no_split() -> None:
    rows = read("stdlib")
    assert len(rows) > 1000
    assert {(row.split, row.file) for row in rows} == {(None, "")}


def test_every_suffix_has_a_reader() -> None:
    assert set(READERS) == {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt"}


# The hub, by its own library, on folders that stand for datasets.


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def dataset(folder: Path, **splits: list[dict[str, Any]]) -> DataSettings:
    folder.mkdir()
    files = "".join(f"\n  - split: {name}\n    path: {name}.jsonl" for name in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:{files}\n---\n")
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_bytes(as_jsonl(rows))
    return data(folder)


def from_hub(settings: DataSettings) -> list[Any]:
    return [*read_hub(settings, Forms(settings.mapping))]


def pairs(name: str, count: int) -> list[dict[str, Any]]:
    return [{"id": i, "prompt": f"{name} {i}", "completion": "b"} for i in range(count)]


@pytest.mark.usefixtures("hub_cache")
def test_the_splits_of_a_hub_dataset_are_kept(tmp_path: Path) -> None:
    names = {"train_sft": 600, "validation": 2, "test_sft": 3, "raw": 1}
    settings = dataset(tmp_path / "set", **{name: pairs(name, count) for name, count in names.items()})
    items = from_hub(settings)
    assert [item for item in items if isinstance(item, Note)] == [
        Note("raw", 1, "file", "split 'raw'"),
        Note("test_sft", 1, "column", "id"),
    ]
    assert [(item.split, item.file, item.line, item.messages[0]["content"])
            for item in items if isinstance(item, Row)] == [
        (split, name, i + 1, f"{name} {i}")
        for split, name in (("test", "test_sft"), ("valid", "validation"), ("train", "train_sft"))
        for i in range(names[name])
    ]  # fmt: skip


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("name", ["train", "everything"])
def test_a_hub_dataset_with_nothing_held_out_is_split_like_one_file(tmp_path: Path, name: str) -> None:
    rows = [
        item for item in from_hub(dataset(tmp_path / "set", **{name: pairs("a", 2)})) if isinstance(item, Row)
    ]
    assert [(row.split, row.file, row.line) for row in rows] == [(None, "", 1), (None, "", 2)]


@pytest.mark.usefixtures("hub_cache")
def test_of_a_hub_dataset_only_its_training_split_is_read_beside_others(tmp_path: Path) -> None:
    items = from_hub(dataset(tmp_path / "set", raw=pairs("raw", 2), train=pairs("train", 1)))
    assert items[0] == Note("raw", 1, "file", "split 'raw'")
    assert [item.messages[0]["content"] for item in items if isinstance(item, Row)] == ["train 0"]


@pytest.mark.usefixtures("hub_cache")
def test_faults_of_a_hub_dataset_are_told_like_those_of_a_file(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a", "name": None}]}, {"messages": None}]
    items = from_hub(dataset(tmp_path / "set", train=rows))
    assert [(item.line, item.kind) for item in items] == [(1, "no_answer"), (2, "empty")]
    with pytest.raises(InputError, match="has 'frage', which is no known form"):
        from_hub(dataset(tmp_path / "other", train=[{"frage": "a"}]))


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_dataset_is_known_by_its_content(tmp_path: Path) -> None:
    one = hub_inputs(dataset(tmp_path / "one", train=pairs("a", 300), test=pairs("b", 3)))
    assert one == hub_inputs(dataset(tmp_path / "same", train=pairs("a", 300), test=pairs("b", 3)))
    assert one != hub_inputs(dataset(tmp_path / "more", train=pairs("a", 301), test=pairs("b", 3)))
    assert one != hub_inputs(dataset(tmp_path / "renamed", train=pairs("a", 300), validation=pairs("b", 3)))


@pytest.mark.usefixtures("hub_cache")
def test_a_subset_is_chosen_by_its_name(tmp_path: Path) -> None:
    settings = dataset(tmp_path / "set", train=pairs("a", 2))
    assert len(from_hub(settings.model_copy(update={"subset": "main"}))) == 3
    with pytest.raises(InputError, match=r"cannot be loaded \(.*'other' not found.*\); check the name"):
        from_hub(settings.model_copy(update={"subset": "other"}))


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_dataset_that_cannot_be_had_is_told_with_the_cure() -> None:
    check_source(data("somebody/something"))
    for ask in (lambda: list(read_source(data("somebody/something"))), lambda: source_inputs(data("a/b"))):
        with pytest.raises(InputError, match=r"is not a path here, .* cannot be loaded \(.*\); .* go online"):
            ask()


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'tunesmith\[hub\]'"):
        check_source(data("somebody/something"))


@pytest.mark.parametrize("name", ["flows/nothing", "somebody/rows.jsonl.gz"])
def test_where_a_path_was_meant_the_hub_is_not_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(InputError, match="no such file"):
        check_source(data(name))
