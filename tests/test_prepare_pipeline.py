"""Every row read is accounted for, stays in its split, and is published whole or not at all."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prepare_tokenise import CHATML, byte_level, save_model

from tasks.config import DataSettings, Settings
from tasks.errors import InputError
from tasks.models.folder import ModelFolder
from tasks.prepare import pipeline, prepare
from tasks.prepare.chats import load_rows
from tasks.prepare.choose import assign_splits, choose_rows, drop_duplicates
from tasks.prepare.pipeline import prepare_data, tokenizer_digest
from tasks.prepare.rows import Row, hash_share
from tasks.prepare.splits import SPLITS, load_splits
from tasks.prepare.tokenise import encode_prompt, load_tokenizer
from tasks.publish import StepOutput
from tasks.tracking import mlflow_run

Pair = tuple[str, str]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(save_model(tmp_path_factory.mktemp("model")), "tiny", "f" * 16, "tiny")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write(path: Path, pairs: list[Pair]) -> str:
    path.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in pairs))
    return str(path)


def numbered(count: int) -> list[Pair]:
    return [(f"what is {i}?", f"it is {i}") for i in range(count)]


def row(pair: Pair, line: int = 1) -> Row:
    turns = [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return Row(line, "prompt+completion", turns)


def rejected(output: StepOutput) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output.path / "rejected.jsonl").read_text().splitlines()]


def published(home: Path) -> list[Path]:
    folder = home / "steps" / "prepare"
    return [*folder.iterdir()] if folder.exists() else []


def test_tokens_and_texts_of_a_split_are_the_same_rows(tmp_path: Path, model: ModelFolder) -> None:
    output = prepare_data(DataSettings(source=write(tmp_path / "rows.jsonl", numbered(60))), model)
    tokenizer = load_tokenizer(model.path)
    tokens = load_splits(output.path)
    assert sum(len(rows) for rows in tokens.values()) == 60
    for split in SPLITS:
        for index, loaded in enumerate(load_rows(output.path, split)):
            ids, supervised = tokens[split].row(index)
            expected = tokenizer.apply_chat_template(loaded["messages"], return_dict=False)
            assert ids.tolist() == expected
            learnt = tokenizer.decode(ids[supervised], skip_special_tokens=False)
            assert learnt == loaded["messages"][-1]["content"] + "<|im_end|>"
            prompt = encode_prompt(tokenizer, loaded["messages"])
            assert ids[: len(prompt)].tolist() == prompt


def test_mlx_lm_takes_the_folder_as_it_is(tmp_path: Path, model: ModelFolder) -> None:
    from mlx_lm.tuner.datasets import load_local_dataset

    output = prepare_data(DataSettings(source=write(tmp_path / "rows.jsonl", numbered(60))), model)
    config = types.SimpleNamespace(mask_prompt=True)
    tokens = load_splits(output.path)
    for split, theirs in zip(
        SPLITS, load_local_dataset(output.path, load_tokenizer(model.path), config), strict=True
    ):
        assert len(theirs) == len(tokens[split])
        for index in range(len(theirs)):
            ids, supervised = tokens[split].row(index)
            assert theirs.process(theirs[index]) == (ids.tolist(), int(supervised.argmax()))


def test_the_report_says_what_will_be_learnt(tmp_path: Path, model: ModelFolder) -> None:
    output = prepare_data(DataSettings(source=write(tmp_path / "rows.jsonl", numbered(60))), model)
    report = output.read_json("report.json")
    splits = load_splits(output.path)
    lengths = np.concatenate([rows.lengths for rows in splits.values()])
    assert report["formats"] == {"prompt+completion": 60}
    assert report["splits"]["test"]["rows"] == len(splits["test"])
    assert report["tokens"] == lengths.sum()
    assert report["supervised_tokens"] == sum(rows.supervised.sum() for rows in splits.values())
    assert report["length_tokens"]["max"] == lengths.max()
    first = load_rows(output.path, "train")[0]["messages"]
    assert report["samples"][0]["supervised"] == [first[1]["content"] + "<|im_end|>"]
    assert first[0]["content"] in report["samples"][0]["rendered"]
    assert len(report["samples"]) == 3


def test_every_row_not_used_is_in_rejected_with_line_reason_and_text(
    tmp_path: Path, model: ModelFolder
) -> None:
    pairs = [*numbered(20), ("what  is 3?", "it is 3\n"), ("long", "word " * 200)]
    output = prepare_data(
        DataSettings(source=write(tmp_path / "rows.jsonl", pairs), max_seq_length=100), model
    )
    report = output.read_json("report.json")
    assert (report["rows_read"], report["rows_used"]) == (22, 20)
    assert (report["duplicates"], report["rejected"]) == (1, 1)
    duplicate, long = rejected(output)
    assert (duplicate["line"], duplicate["reason"]) == (21, "duplicate: the same as line 4")
    assert long["line"] == 22
    assert long["reason"].startswith("too_long: ")
    assert long["text"].endswith("assistant: " + "word " * 200)


pairs_strategy = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["x", "y", " x", "z" * 40])),
    min_size=1,
    max_size=40,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=pairs_strategy, max_rows=st.sampled_from([None, 10, 15]), seed=st.integers(0, 3))
def test_accounts_close_over_any_rows(
    tmp_path: Path, model: ModelFolder, pairs: list[Pair], max_rows: int | None, seed: int
) -> None:
    source = write(tmp_path / "rows.jsonl", pairs)
    data = DataSettings(source=source, max_rows=max_rows, max_seq_length=50, seed=seed)
    chosen = drop_duplicates([row(pair, line) for line, pair in enumerate(pairs)])[0]
    chosen = choose_rows(chosen, max_rows, seed)[0]
    fitting = [one for one in chosen if len(one.messages[1]["content"]) < 40]
    if len(fitting) < 3:
        with pytest.raises(InputError, match="usable rows"):
            prepare_data(data, model)
        return
    output = prepare_data(data, model)
    report = output.read_json("report.json")
    assert report["rows_read"] == len(pairs)
    assert report["rows_read"] == report["rows_used"] + report["duplicates"] + report["rejected"]
    assert report["rows_used"] == sum(len(load_rows(output.path, split)) for split in SPLITS)
    assert report["duplicates"] + report["rejected"] == len(rejected(output))
    assert all(report["splits"][split]["rows"] for split in SPLITS)
    assert report["rows_used"] == len(fitting)


def test_accounts_that_do_not_close_stop_the_step(
    tmp_path: Path, home: Path, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "drop_duplicates", lambda rows: (list(rows)[1:], []))
    with pytest.raises(AssertionError, match="20 rows read"):
        prepare_data(DataSettings(source=write(tmp_path / "rows.jsonl", numbered(20))), model)
    assert published(home) == []


@settings(max_examples=50, deadline=None)
@given(old=st.integers(60, 90), new=st.integers(0, 60), seed=st.integers(0, 50))
def test_added_rows_move_no_old_row_to_another_split(old: int, new: int, seed: int) -> None:
    data = DataSettings(seed=seed)
    before = [row(pair) for pair in numbered(old)]
    after = [*(row((f"new {i}", "x")) for i in range(new)), *before]
    place: dict[str, str] = {}
    splits, moved = assign_splits(before, data)
    for name, indices in splits.items():
        place |= {before[index].identity: name for index in indices}
    for name, indices in assign_splits(after, data)[0].items():
        for index in indices:
            identity = after[index].identity
            assert moved or place.get(identity, name) == name


@settings(max_examples=200, deadline=None)
@given(count=st.integers(3, 30), seed=st.integers(0, 1000))
def test_no_split_is_empty_and_no_row_is_in_two(count: int, seed: int) -> None:
    rows = [row(pair) for pair in numbered(count)]
    splits, moved = assign_splits(rows, DataSettings(seed=seed))
    assert all(splits.values())
    assert sorted(index for indices in splits.values() for index in indices) == list(range(count))
    by_hash = [
        sum(low <= hash_share(r.identity, seed, "split") < low + 0.1 for r in rows) for low in (0, 0.1)
    ]
    assert moved or [len(splits["test"]), len(splits["valid"])] == by_hash


def test_splits_have_the_shares_asked_for() -> None:
    rows = [row(pair) for pair in numbered(5000)]
    splits, moved = assign_splits(rows, DataSettings(test_share=0.2, valid_share=0.1))
    assert moved == 0
    assert len(splits["test"]) == pytest.approx(1000, abs=100)
    assert len(splits["valid"]) == pytest.approx(500, abs=80)


def test_another_seed_splits_otherwise() -> None:
    rows = [row(pair) for pair in numbered(200)]
    assert assign_splits(rows, DataSettings(seed=1)) != assign_splits(rows, DataSettings(seed=2))


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(40)), st.integers(1, 40))
def test_the_rows_chosen_do_not_depend_on_their_order(order: list[int], max_rows: int) -> None:
    rows = [row(pair, line) for line, pair in enumerate(numbered(40))]
    shuffled = [rows[i] for i in order]
    chosen, unused = choose_rows(rows, max_rows, seed=0)
    again, _ = choose_rows(shuffled, max_rows, seed=0)
    assert {one.identity for one in chosen} == {one.identity for one in again}
    assert len(chosen) == max_rows
    assert len(unused) == 40 - max_rows
    assert {one.identity for one in chosen} <= {one.identity for one in choose_rows(rows, 40, seed=0)[0]}


def test_rows_that_differ_in_white_space_only_are_duplicates() -> None:
    kept, unused = drop_duplicates([row(("a  b", "c"), 1), row(("a b", "c"), 2), row(("ab", "c"), 3)])
    assert [one.line for one in kept] == [1, 3]
    assert [one.detail for one in unused] == ["the same as line 1"]


def test_a_system_prompt_is_put_before_rows_without_one_and_moves_no_row(
    tmp_path: Path, model: ModelFolder
) -> None:
    own = {"messages": [{"role": "system", "content": "mine"}, *row(("q", "a")).messages]}
    source = Path(write(tmp_path / "rows.jsonl", numbered(30)))
    source.write_text(source.read_text() + json.dumps(own) + "\n")
    plain = prepare_data(DataSettings(source=str(source)), model)
    kind = prepare_data(DataSettings(source=str(source), system_prompt="be kind"), model)
    for split in SPLITS:
        for before, after in zip(load_rows(plain.path, split), load_rows(kind.path, split), strict=True):
            first = before["messages"][0]
            expected = first if first["role"] == "system" else {"role": "system", "content": "be kind"}
            assert after["messages"][0] == expected
            assert after["messages"][-2:] == before["messages"][-2:]


@pytest.mark.parametrize("fault", ["few", "bad", "template"])
def test_nothing_is_published_after_an_error(
    tmp_path: Path, home: Path, model: ModelFolder, fault: str
) -> None:
    source = Path(write(tmp_path / "rows.jsonl", numbered(2 if fault == "few" else 20)))
    if fault == "bad":
        source.write_text(source.read_text() + "{\n")
    if fault == "template":
        refusing = CHATML.replace(
            "{% for",
            "{% if messages[0].content == 'what is 7?' %}{{ raise_exception('no') }}{% endif %}{% for",
            1,
        )
        model = ModelFolder(save_model(tmp_path / "model", byte_level(refusing)), "odd", "0", "odd")
    messages = {
        "few": "2 usable rows of 2 read",
        "bad": "line 21: not JSON",
        "template": "line 8: .*refuses it: no",
    }
    with pytest.raises(InputError, match=messages[fault]):
        prepare_data(DataSettings(source=str(source)), model)
    assert published(home) == []


def test_unchanged_inputs_are_not_prepared_again(tmp_path: Path, model: ModelFolder) -> None:
    data = DataSettings(source=write(tmp_path / "rows.jsonl", numbered(20)))
    first = prepare_data(data, model)
    again = prepare_data(data, ModelFolder(model.path, "other weights", "0" * 16, "other"))
    assert (first.reused, again.reused) == (False, True)
    assert first.path == again.path
    write(tmp_path / "rows.jsonl", numbered(21))
    assert prepare_data(data, model).path != first.path


def test_another_template_is_another_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_level(CHATML)
    same = [tokenizer_digest(save_model(tmp_path / name, tokenizer)) for name in ("one", "two")]
    other = tokenizer_digest(
        save_model(tmp_path / "three", byte_level(CHATML.replace("user", "human") + " "))
    )
    assert same[0] == same[1] != other


def test_equal_inputs_give_equal_bytes(
    tmp_path: Path, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataSettings(source=write(tmp_path / "rows.jsonl", numbered(40)))
    contents = []
    for name in ("first", "second"):
        monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / name))
        folder = prepare_data(data, model).path
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]


def test_the_report_and_the_unused_rows_are_logged_to_the_run(tmp_path: Path, model: ModelFolder) -> None:
    data = DataSettings(source=write(tmp_path / "rows.jsonl", numbered(20)))
    with mlflow_run(Settings(), "a run", {}) as run:
        output = prepare.fn(data, model, run)
    assert run.client.get_run(run.id).data.tags["tunesmith.data"] == output.fingerprint
    kept = {path.path for path in run.client.list_artifacts(run.id, "data")}
    assert kept == {"data/report.json", "data/rejected.jsonl"}


def test_the_built_in_rows_prepare_and_say_which_python(model: ModelFolder) -> None:
    report = prepare_data(DataSettings(max_rows=100), model).read_json("report.json")
    assert report["rows_used"] == 100
    assert report["python"].startswith("3.")
    assert report["unused_by_reason"]["not_chosen"] == report["rejected"]
