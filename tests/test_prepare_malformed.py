"""A corpus of broken files: what is read of each, and what is said of the rest, to the line.

`tests/data/malformed/` is kept byte for byte; a file's name says what is wrong with it.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.config import DataSettings
from tasks.errors import InputError
from tasks.prepare.rows import FAULTS, NOTES, Note, Row, Unused
from tasks.prepare.sources import check_source, read_source

CORPUS = Path(__file__).parent / "data" / "malformed"

# Rows read; then in their order the lines and kinds of all rows that are not, and of all notes: "1-3 json".
READ = {
    "csv_bom_crlf.csv": (1, "1 bom, 1 crlf, 2 blank_line, 5 empty"),
    "csv_bom_within.csv": (3, "3 bom"),
    "csv_empty_cells.csv": (3, "1 column, 4 blank_line, 5 empty, 6 two_forms, 7 empty"),
    "csv_excel_separator.csv": (1, "2 crlf, 4 columns"),
    "csv_invalid_utf8.csv": (2, "2 encoding, 4 encoding"),
    "csv_json_cells.csv": (2, "3 json, 4 duplicate_key, 5 type, 7 no_user_turn"),
    "csv_nul.csv": (1, "2 nul"),
    "csv_only_header.csv": (0, ""),
    "csv_quoted_breaks.csv": (2, "5 columns, 8 empty"),
    "csv_quotes.csv": (2, "2 quotes, 4 quotes, 6 quotes"),
    "csv_ragged.csv": (2, "2 columns, 4 columns, 6 columns"),
    "csv_semicolons.csv": (2, "1 column, 3 columns"),
    "json_bom_crlf.json": (1, "1 bom, 5 format, 1 crlf"),
    "json_faults.json": (1, "2 format, 8 duplicate_key, 8 type, 9 not_a_number, 11 empty"),
    "json_invalid_utf8.json": (1, "1 encoding, 3 encoding"),
    "json_is_lines.json": (2, "1 blank_line, 3 json"),
    "json_nested.json": (2, "2-3 nested"),
    "json_no_rows.json": (0, ""),
    "json_surrogate.json": (0, "1 surrogate, 1 nul"),
    "jsonl_blank_lines.jsonl": (1, "1-2 blank_line, 4 blank_line, 5 json, 6-7 blank_line"),
    "jsonl_bom.jsonl": (2, "1 bom"),
    "jsonl_bom_within.jsonl": (2, "2-3 bom, 3 blank_line, 4 bom, 4 format"),
    "jsonl_broken.jsonl": (2, "1 json, 3-6 json, 8 json"),
    "jsonl_columns.ndjson": (6, "1-5 column, 5 column, 7 format"),
    "jsonl_content_parts.jsonl": (1, "1 type, 3-4 type"),
    "jsonl_crlf.jsonl": (4, "2 crlf, 3 blank_line, 4 json"),
    "jsonl_duplicate_key.jsonl": (1, "1 duplicate_key, 3 duplicate_key"),
    "jsonl_empty_texts.jsonl": (2, "1-10 empty, 13-14 empty"),
    "jsonl_huge_number.jsonl": (1, "1 huge_number, 2 column, 3 huge_number"),
    "jsonl_invalid_utf8.jsonl": (2, "1 encoding, 3 encoding, 5 encoding"),
    "jsonl_nested.jsonl": (2, "1-2 nested, 3 column, 5 nested"),
    "jsonl_no_newline_at_end.jsonl": (2, ""),
    "jsonl_not_a_number.jsonl": (1, "1-5 not_a_number, 6 column"),
    "jsonl_nul.jsonl": (2, "1-2 nul, 5 nul"),
    "jsonl_only_blank_lines.jsonl": (0, "1-3 blank_line"),
    "jsonl_roles.jsonl": (1, "1-4 role, 6-9 role"),
    "jsonl_several_problems.jsonl": (0, "1 not_a_number, 2 empty, 3 role, 4 type"),
    "jsonl_speakers.jsonl": (
        1,
        "1 no_user_turn, 2 no_answer, 3-4 no_user_turn, 5 no_answer, 7-9 no_user_turn",
    ),
    "jsonl_surrogates.jsonl": (3, "1-3 surrogate, 5-7 surrogate, 8 column"),
    "jsonl_tools.jsonl": (
        2,
        "1 type, 3 role, 4 type, 5 duplicate_key, 6-8 type, 9 json, 10 type, 11 empty, 12 type",
    ),
    "jsonl_two_forms.jsonl": (6, "1 two_forms, 2 column, 3-5 two_forms, 5 empty"),
    "jsonl_two_frames.jsonl.zst": (2, "2 type"),
    "jsonl_two_members.jsonl.gz": (2, "2 json"),
    "jsonl_types.jsonl": (1, "1-5 type, 7-19 type"),
    "jsonl_unknown_form.jsonl": (1, "1-5 format, 7 empty"),
    "jsonl_utf16_without_bom.jsonl": (0, "1-2 nul"),
    "jsonl_zero_padded.jsonl.gz": (2, ""),
    "parquet_invalid_utf8.parquet": (2, "2 encoding"),
    "parquet_mixed.parquet": (2, "1 column, 3-4 empty"),
    "parquet_no_rows.parquet": (0, ""),
    "parquet_nulls.parquet": (2, "1 column, 2-3 empty, 4 role, 6 type, 7 no_user_turn"),
    "parquet_types.parquet": (0, "1 type"),
    "tsv_faults.tsv": (2, "1 column, 3 columns, 4 empty"),
    "txt_bom_crlf.txt": (2, "1 bom, 1 crlf"),
    "txt_bytes.txt": (1, "1 encoding, 3 encoding, 7 encoding, 9 encoding, 11 nul"),
    "txt_odd.txt": (2, "6 no_answer"),
    "txt_only_blank_lines.txt": (0, ""),
    "txt_unanswered.txt": (2, "2 no_answer, 8 no_answer"),
}

# Rows read before the file cannot be read on; where, empty for the file as a whole; the reason.
REFUSED = {
    "csv_duplicate_header.csv": (0, ", line 1", "'question' twice"),
    "csv_invalid_utf8_header.csv": (0, ", line 1", "not UTF-8"),
    "csv_is_excel.csv": (0, "", "an Excel file"),
    "csv_old_mac.csv": (0, ", line 1", "put quotes around line breaks"),
    "csv_only_blank_lines.csv": (0, "", "has no header"),
    "csv_open_quote.csv": (1, ", line 3", "never ends"),
    "csv_quotes_over_lines.csv": (0, ", line 2", "never ends"),
    "csv_truncated.csv.gz": (3, ", after line 4", "ends too early"),
    "csv_unnamed_header.csv": (0, ", line 1", "no name for column 1"),
    "csv_without_header.csv": (0, ", line 1", "has to name the columns; it has 'What is it?'"),
    "json_comma_at_end.json": (1, ", line 3", "a comma stands before the array's end"),
    "json_cut_off.json": (1, ", line 3", "has no end"),
    "json_missing_colon.json": (1, ", line 3", "cannot be told apart"),
    "json_missing_comma.json": (1, ", line 3", "'{' stands where the array needs ','"),
    "json_not_closed.json": (1, ", line 2", "the end of the file stands where the array needs ','"),
    "json_nul.json": (1, ", line 2", "NUL bytes"),
    "json_one_object.json": (0, "", "one JSON object over several lines"),
    "json_open_quote.json": (1, ", line 2", "cannot be told apart"),
    "json_two_arrays.json": (1, ", line 2", "follows the array's end"),
    "jsonl_after_the_end.jsonl.gz": (1, ", after line 1", "is damaged"),
    "jsonl_is_gzip.jsonl": (0, "", "name end in .gz"),
    "jsonl_is_parquet.jsonl": (0, "", "name end in .parquet"),
    "jsonl_no_bytes.jsonl": (0, "", "is empty"),
    "jsonl_not_gzip.jsonl.gz": (0, "", "is damaged"),
    "jsonl_not_zstd.jsonl.zst": (0, "", "is damaged"),
    "jsonl_truncated.jsonl.gz": (21, ", after line 21", "ends too early"),
    "jsonl_truncated.jsonl.zst": (0, "", "ends too early"),
    "jsonl_utf16_big.jsonl": (0, "", "is UTF-16; save it as UTF-8"),
    "jsonl_utf16_little.jsonl": (0, "", "is UTF-16; save it as UTF-8"),
    "jsonl_wrong_checksum.jsonl.gz": (0, "", "is damaged"),
    "jsonl_wrong_checksum.jsonl.zst": (0, "", "is damaged"),
    "parquet_duplicate_columns.parquet": (0, "", "'text' twice"),
    "parquet_no_bytes_left.parquet": (0, "", "not Parquet, or damaged"),
    "parquet_not.parquet": (0, "", "not Parquet, or damaged"),
    "parquet_truncated.parquet.gz": (0, "", "ends too early"),
    "parquet_unknown_columns.parquet": (0, "", "has 'frage', 'antwort', which is no known form"),
    "parquet_wrong_checksum.parquet": (256, ", after row 256", "not Parquet, or damaged"),
    "tsv_utf16.tsv": (0, "", "is UTF-16; save it as UTF-8"),
    "txt_utf16.txt": (0, "", "is UTF-16; save it as UTF-8"),
}


def read(source: Path) -> tuple[int, list[tuple[int, str]]]:
    """The number of rows, and (line, kind) of all else."""
    rows, others = 0, []
    data = DataSettings(source=str(source))
    check_source(data)
    for item in read_source(data):
        if isinstance(item, Row):
            rows += 1
        else:
            others.append((item.line, item.kind))
    return rows, others


def expected(listed: str) -> Iterator[tuple[int, str]]:
    for lines, kind in (one.split(" ") for one in listed.split(", ") if one):
        first, _, last = lines.partition("-")
        yield from ((line, kind) for line in range(int(first), int(last or first) + 1))


@pytest.mark.parametrize("name", READ)
def test_each_bad_row_is_told_with_its_line_and_the_others_are_read(name: str) -> None:
    rows, listed = READ[name]
    assert read(CORPUS / name) == (rows, [*expected(listed)])


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_on_is_refused_and_not_cut_short(name: str) -> None:
    rows, line, reason = REFUSED[name]
    data = DataSettings(source=str(CORPUS / name))
    stream = read_source(data)
    before = 0
    with pytest.raises(InputError) as raised:  # noqa: PT012  (what is read before it is counted)
        check_source(data)
        for item in stream:
            before += isinstance(item, Row)
    said = str(raised.value)
    assert before == rows
    assert said.startswith(f"{CORPUS / name}{line}: ")
    assert reason in said


def test_every_file_and_every_kind_of_fault_and_note_is_in_the_tables() -> None:
    assert {path.name for path in CORPUS.iterdir()} == {*READ, *REFUSED}
    kinds = {kind for _, listed in READ.values() for _, kind in expected(listed)}
    made_elsewhere = {"too_large", "template", "file", "control_text", "tools_unwritten", "truncated"}
    assert kinds == ({*FAULTS} | {*NOTES}) - made_elsewhere


@pytest.mark.parametrize("name", READ)
def test_a_bad_row_keeps_its_text_and_can_be_written_out(name: str) -> None:
    for item in read_source(DataSettings(source=str(CORPUS / name))):
        if isinstance(item, Unused):
            assert item.text or name == "parquet_invalid_utf8.parquet"
            assert len(item.text) <= 2000
            (item.text + item.detail).encode("utf-8")
        elif isinstance(item, Note):
            item.detail.encode("utf-8")


GOOD = b'{"prompt": "a", "completion": "b"}'


def write(path: Path, *pieces: bytes) -> Path:
    with path.open("wb") as file:
        file.writelines(pieces)
    return path


def hundred_megabytes() -> Iterator[bytes]:
    for _ in range(100):
        yield b"a" * 1_000_000


def peak_bytes(path: Path) -> int:
    tracemalloc.start()
    try:
        for _ in read_source(DataSettings(source=str(path))):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_row_of_100_megabytes_is_told_and_never_held(tmp_path: Path) -> None:
    long = [b'{"prompt": "', *hundred_megabytes(), b'"}']
    source = write(tmp_path / "rows.jsonl", GOOD, b"\n", *long, b"\n", GOOD, b"\n", *hundred_megabytes())
    assert read(source) == (2, [(2, "too_large"), (4, "too_large")])
    assert peak_bytes(source) < 64_000_000


def test_a_cell_an_element_and_a_line_of_text_may_be_as_long(tmp_path: Path) -> None:
    table = write(tmp_path / "a.csv", b'text\na\n"', *hundred_megabytes(), b'"\nb\n')
    assert read(table) == (2, [(3, "too_large")])
    pairs = write(tmp_path / "a.txt", b"a\n", *hundred_megabytes(), b"\nc\nd\n")
    assert read(pairs) == (1, [(1, "too_large")])
    array = write(
        tmp_path / "a.json", b"[", GOOD, b',\n{"a": "\\"', *hundred_megabytes(), b'\\\\"},\n', GOOD, b"]"
    )
    assert read(array) == (2, [(2, "too_large")])
    assert max(map(peak_bytes, (table, pairs))) < 64_000_000
    assert peak_bytes(array) < 100_000_000


def test_a_row_that_is_just_not_too_long_is_read(tmp_path: Path) -> None:
    before, after = b'{"prompt": "a", "completion": "', b'"}'
    fits = b"b" * ((32 << 20) - len(before) - len(after))
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    assert read(write(lines, before, fits[1:], after, b"\n")) == (1, [])
    assert read(write(lines, before, fits, after, b"\n")) == (0, [(1, "too_large")])
    assert read(write(array, b"[", before, fits, after, b"]")) == (1, [])
    assert read(write(array, b"[", before, fits, b"b", after, b"]")) == (0, [(1, "too_large")])


@pytest.mark.parametrize("separator", [b",\n", b"," + b"\n" * 9999])
def test_an_array_is_read_in_bounded_memory(tmp_path: Path, separator: bytes) -> None:
    row = b'{"prompt": "a", "completion": "' + b"b" * 2000 + b'"}'
    count = 10_000_000 // len(row + separator)
    source = write(tmp_path / "rows.json", b"[", *[row + separator] * count, row, b"]")
    assert peak_bytes(source) < 4_000_000
    assert read(source) == (count + 1, [])


def test_an_open_quote_in_a_long_line_hides_no_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.csv", b'text\n"', *hundred_megabytes(), b"\nb\nc\n")
    with pytest.raises(InputError, match=r"rows\.csv, line 2: a line over 32 MiB"):
        read(source)
    source = write(tmp_path / "rows.csv", b'text\na\n"', *[b"a" * 999_999 + b"\n"] * 40)
    with pytest.raises(InputError, match=r"rows\.csv, line 3: a row over 32 MiB"):
        read(source)
    source = write(tmp_path / "rows.json", b"[", GOOD, b',\n{"a": "', *hundred_megabytes(), b"}]")
    with pytest.raises(InputError, match=r"rows\.json, line 2: the row that begins here has no end"):
        read(source)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "rows.jsonl", GOOD)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("tasks.prepare.opening.io.FileIO", refuse)
    with pytest.raises(InputError, match=r"rows\.jsonl: Permission denied; make the file readable"):
        read(source)
