"""Every row read is accounted for, stays in its split, and is published whole or not at all."""

from __future__ import annotations

import gzip
import json
import types
from dataclasses import replace
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
from tasks.prepare import pipeline
from tasks.prepare.chats import load_rows, load_template
from tasks.prepare.choose import assign_splits, distinct, only, smallest_hashes
from tasks.prepare.pipeline import prepare_data, tokenizer_digest
from tasks.prepare.rows import SPLITS, Note, Row, Stream, Unused, hash_share
from tasks.prepare.splits import load_splits
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
    learnt = [text for text, supervised in report["samples"][0]["pieces"] if supervised]
    assert learnt == [first[1]["content"] + "<|im_end|>"]
    assert first[0]["content"] in report["samples"][0]["pieces"][0][0]
    assert len(report["samples"]) == 5


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
    rows = list(distinct(iter([row(pair, line) for line, pair in enumerate(pairs)])))
    chosen = [one for one in rows if isinstance(one, Row)]
    if max_rows is not None:
        hashes = smallest_hashes(iter(rows), max_rows, seed)
        chosen = [one for one in chosen if one.identity in hashes]
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


def forms(number: int) -> list[dict[str, Any]]:
    question, answer = f"question {number}", f"answer {number}"
    turns = row((question, answer)).messages
    return [
        {"messages": turns},
        {"prompt": question, "completion": answer},
        {"prompt": question, "response": answer, "id": number},
        {"question": question, "answer": answer},
        {"instruction": question, "input": "", "output": answer},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        {"text": f"{question} {answer}"},
    ]


FAULTY = [
    b'{"prompt": "a", ',
    b'{"prompt": "\xff", "completion": "b"}',
    b'{"prompt": "a", "prompt": "b", "completion": "c"}',
    b'{"prompt": NaN, "completion": "b"}',
    b'{"messages": [{"role": "usr", "content": "a"}]}',
    b'{"messages": [{"role": "assistant", "content": "a"}]}',
    b'{"prompt": "a", "completion": "  "}',
    b'{"prompt": 3, "completion": "b"}',
    b"[1, 2]",
    b'{"odd": 1}',
]

lines_strategy = st.lists(
    st.one_of(
        st.builds(lambda n, form: json.dumps(forms(n)[form]).encode(), st.integers(0, 30), st.integers(0, 6)),
        st.sampled_from(FAULTY),
        st.just(json.dumps({"prompt": "word " * 100, "completion": "x"}).encode()),
        st.sampled_from([b"", b"   "]),
    ),
    max_size=60,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=lines_strategy, ending=st.sampled_from([b"\n", b"\r\n"]), bom=st.booleans(), packed=st.booleans()
)
def test_accounts_close_over_any_mixture_of_forms_and_faults(
    tmp_path: Path, model: ModelFolder, lines: list[bytes], ending: bytes, bom: bool, packed: bool
) -> None:
    lines = [*lines, *(json.dumps(forms(100 + n)[1]).encode() for n in range(3))]
    content = b"\xef\xbb\xbf" * bom + ending.join(lines)
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    data = DataSettings(source=str(path), on_bad_row="skip", max_seq_length=150)
    output = prepare_data(data, model)
    report = output.read_json("report.json")
    written = [line for line in lines if line.strip()]
    assert report["rows_read"] == len(written)
    assert report["rows_read"] == report["rows_used"] + report["duplicates"] + report["rejected"]
    assert report["rows_used"] == sum(len(load_rows(output.path, name)) for name in SPLITS)
    unused = rejected(output)
    assert report["duplicates"] + report["rejected"] == len(unused)
    assert [one["line"] for one in unused] == sorted({one["line"] for one in unused})
    faulty = [number for number, line in enumerate(lines, start=1) if line in FAULTY]
    policy = ("duplicate", "too_long")
    assert [one["line"] for one in unused if one["reason"].split(":")[0] not in policy] == faulty


def test_accounts_that_do_not_close_stop_the_step(
    tmp_path: Path, home: Path, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing(stream: Stream, near_duplicates: float | None = None) -> Stream:
        next(stream)
        yield from stream

    monkeypatch.setattr(pipeline, "distinct", losing)
    with pytest.raises(AssertionError, match="20 rows read, but 19 used"):
        prepare_data(DataSettings(source=write(tmp_path / "rows.jsonl", numbered(20))), model)
    assert published(home) == []


def split(rows: list[Row], data: DataSettings, given: list[int] | None = None) -> tuple[list[int], int]:
    shares = np.array([hash_share(one.identity, data.seed, "split") for one in rows])
    places = np.array([-1] * len(rows) if given is None else given, np.int8)
    splits, moved = assign_splits(shares, places, data)
    return splits.tolist(), moved


@settings(max_examples=50, deadline=None)
@given(old=st.integers(60, 90), new=st.integers(0, 60), seed=st.integers(0, 50))
def test_added_rows_move_no_old_row_to_another_split(old: int, new: int, seed: int) -> None:
    data = DataSettings(seed=seed)
    before = [row(pair) for pair in numbered(old)]
    after = [*(row((f"new {i}", "x")) for i in range(new)), *before]
    splits, moved = split(before, data)
    assert moved or split(after, data)[0][new:] == splits


@settings(max_examples=200, deadline=None)
@given(count=st.integers(3, 30), seed=st.integers(0, 1000))
def test_no_split_is_empty(count: int, seed: int) -> None:
    rows = [row(pair) for pair in numbered(count)]
    splits, moved = split(rows, DataSettings(seed=seed))
    sizes = [splits.count(index) for index in range(3)]
    assert all(sizes)
    assert sum(sizes) == count
    by_hash = [
        sum(low <= hash_share(r.identity, seed, "split") < low + 0.1 for r in rows) for low in (0.1, 0)
    ]
    assert moved or sizes[1:] == by_hash


def test_splits_have_the_shares_asked_for() -> None:
    rows = [row(pair) for pair in numbered(5000)]
    splits, moved = split(rows, DataSettings(test_share=0.2, valid_share=0.1))
    assert moved == 0
    assert splits.count(2) == pytest.approx(1000, abs=100)
    assert splits.count(1) == pytest.approx(500, abs=80)


def test_another_seed_splits_otherwise() -> None:
    rows = [row(pair) for pair in numbered(200)]
    assert split(rows, DataSettings(seed=1)) != split(rows, DataSettings(seed=2))


def test_given_splits_are_kept_and_a_lacking_one_is_taken_from_training() -> None:
    rows = [row(pair) for pair in numbered(300)]
    given = [2] * 20 + [0] * 280
    splits, moved = split(rows, DataSettings(), given)
    assert moved == 0
    assert splits[:20] == [2] * 20
    assert set(splits[20:]) == {0, 1}
    assert split(rows, DataSettings(), [2] * 20 + [1] * 30 + [0] * 250)[0] == [2] * 20 + [1] * 30 + [0] * 250


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(40)), st.integers(1, 40))
def test_the_rows_chosen_do_not_depend_on_their_order(order: list[int], max_rows: int) -> None:
    rows = [row(pair, line) for line, pair in enumerate(numbered(40))]
    chosen = smallest_hashes(iter(rows), max_rows, seed=0)
    assert chosen == smallest_hashes((rows[i] for i in order), max_rows, seed=0)
    assert len(chosen) == max_rows
    assert chosen <= smallest_hashes(iter(rows), 40, seed=0)
    kept = [*only(iter(rows), chosen, "why")]
    assert [one.line for one in kept if isinstance(one, Row)] == [
        one.line for one in rows if one.identity in chosen
    ]
    assert sum(isinstance(one, Unused) for one in kept) == 40 - max_rows


def test_rows_that_differ_in_white_space_only_are_duplicates() -> None:
    rows = [row(("a  b", "c"), 1), Note("", 1, "crlf"), row(("a b", "c"), 2), row(("ab", "c"), 3)]
    kept, note, duplicate, other = distinct(iter(rows))
    assert isinstance(duplicate, Unused)
    assert (duplicate.kind, duplicate.detail) == ("duplicate", "the same as line 1")
    assert (kept, note, other) == (rows[0], rows[1], rows[3])


def test_a_training_row_that_is_held_out_too_is_taken_from_training() -> None:
    held = replace(row(("a", "b"), 7), file="test.jsonl", split="test")
    leaked = replace(row(("a ", "b"), 9), file="train.jsonl", split="train")
    kept, unused = distinct(iter([held, leaked]))
    assert kept is held
    assert isinstance(unused, Unused)
    assert (unused.kind, unused.line) == ("leaked", 9)
    assert unused.detail == "the same as line 7 of test.jsonl"


SENTENCE = "the quick brown fox jumps over the lazy dog and runs far into the deep dark wood at night"


def test_near_duplicates_are_found_and_others_are_not() -> None:
    answer = " ".join([SENTENCE] * 3)
    near = [
        row(("say", answer), 1),
        row(("say", answer + " again"), 2),
        row(("say", answer[::-1]), 3),
    ]
    kept = [*distinct(iter(near), near_duplicates=0.8)]
    assert [one.kind if isinstance(one, Unused) else "kept" for one in kept] == [
        "kept",
        "near_duplicate",
        "kept",
    ]
    assert all(isinstance(one, Row) for one in distinct(iter(near)))


@pytest.mark.parametrize("policy", ["drop", "error", "truncate-prompt"])
def test_no_policy_for_long_rows_cuts_an_answer(tmp_path: Path, model: ModelFolder, policy: str) -> None:
    long_prompt, long_answer = ("word " * 200, "short"), ("short", "word " * 200)
    source = write(tmp_path / "rows.jsonl", [*numbered(20), long_prompt, long_answer])
    data = DataSettings(source=source, max_seq_length=100, on_long_row=policy)  # type: ignore[arg-type]
    if policy == "error":
        with pytest.raises(InputError, match=r"line 21: .*\n.*line 22: .*\n.*data.on_long_row=drop"):
            prepare_data(data, model)
        return
    output = prepare_data(data, model)
    report = output.read_json("report.json")
    rows = [loaded["messages"] for name in SPLITS for loaded in load_rows(output.path, name)]
    cut = [chat for chat in rows if chat[1]["content"] == "short"]
    assert report["truncated"] == len(cut) == (policy == "truncate-prompt")
    assert all(long_prompt[0].endswith(chat[0]["content"]) for chat in cut)
    tokens = load_splits(output.path)
    assert max(rows.lengths.max() for rows in tokens.values()) <= 100
    assert [one["line"] for one in rejected(output)] == ([22] if cut else [21, 22])


def test_bad_rows_end_the_preparation_or_are_passed_over(tmp_path: Path, model: ModelFolder) -> None:
    source = Path(write(tmp_path / "rows.jsonl", numbered(20)))
    source.write_text(source.read_text() + '{"prompt": ""\n{"prompt": "a"}\n')
    with pytest.raises(InputError, match="on_bad_row=skip") as error:
        prepare_data(DataSettings(source=str(source)), model)
    assert "line 21" in str(error.value)
    assert "line 22" in str(error.value)
    assert "the other 20 rows" in str(error.value)
    output = prepare_data(DataSettings(source=str(source), on_bad_row="skip"), model)
    assert [one["line"] for one in rejected(output)] == [21, 22]
    reasons = output.read_json("report.json")["reasons"]
    assert {kind: reason["rows"] for kind, reason in reasons.items()} == {"json": 1, "format": 1}


def test_a_refusal_for_two_reasons_names_both_settings(tmp_path: Path, model: ModelFolder) -> None:
    source = Path(write(tmp_path / "rows.jsonl", [*numbered(20), ("word " * 200, "short")]))
    source.write_text(source.read_text() + '{"prompt": ""\n')
    data = DataSettings(source=str(source), max_seq_length=100, on_long_row="error")
    with pytest.raises(InputError, match=r"rows: data.on_bad_row=skip data.on_long_row=drop$"):
        prepare_data(data, model)
    lenient = data.model_copy(update={"on_bad_row": "skip", "on_long_row": "drop"})
    assert len(rejected(prepare_data(lenient, model))) == 2


def test_texts_are_learnt_whole_and_mlx_lm_takes_them(tmp_path: Path, model: ModelFolder) -> None:
    from mlx_lm.tuner.datasets import load_local_dataset

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(40)))
    output = prepare_data(DataSettings(source=str(path)), model)
    tokens = load_splits(output.path)
    config = types.SimpleNamespace(mask_prompt=False)
    for name, theirs in zip(
        SPLITS, load_local_dataset(output.path, load_tokenizer(model.path), config), strict=True
    ):
        assert len(theirs) == len(tokens[name])
        for index in range(len(theirs)):
            ids, supervised = tokens[name].row(index)
            assert theirs.process(theirs[index])[0] == ids.tolist()
            assert supervised.tolist() == [False] + [True] * (len(ids) - 1)


def test_texts_beside_chats_stay_readable_for_mlx_lm(tmp_path: Path, model: ModelFolder) -> None:
    from mlx_lm.tuner.datasets import load_local_dataset

    path = Path(write(tmp_path / "rows.jsonl", numbered(30)))
    path.write_text(path.read_text() + "".join(json.dumps({"text": f"t {i}"}) + "\n" for i in range(30)))
    output = prepare_data(DataSettings(source=str(path)), model)
    config = types.SimpleNamespace(mask_prompt=True)
    for theirs in load_local_dataset(output.path, load_tokenizer(model.path), config):
        assert all(theirs.process(theirs[index])[0] for index in range(len(theirs)))
    assert output.read_json("report.json")["formats"] == {"prompt+completion": 30, "text": 30}


def test_a_template_of_its_own_goes_with_the_data(tmp_path: Path, model: ModelFolder) -> None:
    source = write(tmp_path / "rows.jsonl", numbered(20))
    own = prepare_data(DataSettings(source=source), model)
    alpaca = prepare_data(DataSettings(source=source, template="alpaca"), model)
    assert load_template(own.path) is None
    assert alpaca.read_json("report.json")["template"] == "Alpaca"
    tokenizer = load_tokenizer(model.path)
    ids, supervised = load_splits(alpaca.path)["train"].row(0)
    chat = load_rows(alpaca.path, "train")[0]["messages"]
    question, answer = (turn["content"] for turn in chat)
    written = f"### Instruction:\n{question}\n\n### Response:\n{answer}<|im_end|>\n\n"
    assert tokenizer.decode(ids, skip_special_tokens=False) == written
    assert tokenizer.decode(ids[supervised], skip_special_tokens=False) == f"{answer}<|im_end|>"
    prompt = encode_prompt(tokenizer, chat, template=load_template(alpaca.path))
    assert ids[: len(prompt)].tolist() == prompt


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


def test_the_report_and_the_unused_rows_are_logged_to_the_run(
    tmp_path: Path, model: ModelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataSettings(source=write(tmp_path / "rows.jsonl", [*numbered(20), *numbered(2)]))
    with mlflow_run(Settings(), "a run", {}) as run:
        output = prepare_data(data, model, run)
    assert "not used: 2 the same as another row; which and why: " in caplog.text
    assert run.client.get_run(run.id).data.tags["tunesmith.data"] == output.fingerprint
    kept = {path.path for path in run.client.list_artifacts(run.id, "data")}
    assert kept == {"data/report.json", "data/report.html", "data/rejected.jsonl"}


def test_the_built_in_rows_prepare_and_say_which_python(model: ModelFolder) -> None:
    report = prepare_data(DataSettings(max_rows=100), model).read_json("report.json")
    assert report["rows_used"] == 100
    assert report["python"].startswith("3.")
    assert report["reasons"]["not_chosen"]["rows"] == report["rejected"]
