"""From a source of rows to training-ready tokens: read, deduplicate, choose, tokenise, split, report."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tasks.config import DataSettings
from tasks.errors import InputError
from tasks.models.folder import ModelFolder
from tasks.prepare.chats import save_rows, write_jsonl
from tasks.prepare.choose import Unused, assign_splits, choose_rows, drop_duplicates
from tasks.prepare.formats import bad_rows_error
from tasks.prepare.report import SAMPLES, data_report, sample
from tasks.prepare.rows import Row
from tasks.prepare.sources import check_source, read_source, source_inputs
from tasks.prepare.splits import SPLITS, TokenRows, save_splits
from tasks.prepare.templates import TemplateError
from tasks.prepare.tokenise import ChatEncoder, TokenRow, chat_encoder, load_tokenizer
from tasks.progress import progress
from tasks.publish import StepOutput, run_step, write_json
from tasks.tracking import Run

log = logging.getLogger(__name__)

BATCH_ROWS = 512
REPORT_FILE, REJECTED_FILE = "report.json", "rejected.jsonl"
TOKENIZER_FILES = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab*")


def prepare_data(data: DataSettings, model: ModelFolder, run: Run | None = None) -> StepOutput:
    """Prepare a source for a model; models of the same tokenizer share the output.

    The folder holds `train.jsonl`, `valid.jsonl` and `test.jsonl` in mlx-lm's chat form,
    `tokens.safetensors` with the same rows in the same order, `rejected.jsonl` (every row not used) and
    `report.json`. The report and the rows not used are logged to the run, if one is given.

    Raises:
        InputError: the source is missing or has bad rows, the model's tokenizer or template cannot be
            used, or fewer than three rows are left. Nothing is published then.
    """
    check_source(data)
    with progress("looking at the rows"):
        source = source_inputs(data.source)
    inputs = {
        "data": data.model_dump(mode="json", exclude={"source"}),
        "source": source,
        "tokenizer": tokenizer_digest(model.path),
    }
    output = run_step("prepare", inputs, lambda folder: _make(folder, data, model))
    if run is not None:
        run.set_tags({"tunesmith.data": output.fingerprint})
        run.log_files(output.path, "data", only=(REPORT_FILE, REJECTED_FILE))
    return output


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 of the names and contents of a model folder's tokenizer and chat template files."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Tokenised:
    rows: list[Row]
    tokens: list[TokenRow]
    too_long: list[Unused]


def _make(folder: Path, data: DataSettings, model: ModelFolder) -> None:
    encoder = chat_encoder(load_tokenizer(model.path))
    read = _read(data)
    distinct, duplicates = drop_duplicates(read)
    chosen, not_chosen = choose_rows(distinct, data.max_rows, data.seed)
    done = _tokenise([_with_system(row, data.system_prompt) for row in chosen], encoder, data)
    unused = sorted([*duplicates, *not_chosen, *done.too_long], key=lambda one: one.row.line)
    _check_accounts(read, done, unused, data)
    in_source = {row.line: row for row in chosen}
    places, moved = assign_splits([in_source[row.line] for row in done.rows], data)
    splits = {name: TokenRows.from_rows([done.tokens[i] for i in places[name]]) for name in SPLITS}
    for name in SPLITS:
        save_rows(folder, name, (done.rows[i].messages for i in places[name]))
    save_splits(folder, splits)
    write_jsonl(folder / REJECTED_FILE, map(_rejected, unused))
    report = data_report(data, done.rows, unused, splits)
    report |= {"rows_moved_to_fill_a_split": moved, "template": encoder.template.name}
    shown = [sample(done.rows[i], encoder, *done.tokens[i]) for i in places["train"][:SAMPLES]]
    write_json(folder / REPORT_FILE, {**report, "samples": shown})
    counts = ", ".join(f"{len(splits[name]):,} {name}" for name in SPLITS)
    log.info("prepare: %s rows read, used: %s", f"{len(read):,}", counts)


def _read(data: DataSettings) -> list[Row]:
    rows = []
    with progress("reading rows") as bar:
        for row in read_source(data.source):
            rows.append(row)
            bar.advance(1)
    return rows


def _with_system(row: Row, system_prompt: str | None) -> Row:
    if system_prompt is None or any(turn["role"] == "system" for turn in row.messages):
        return row
    return replace(row, messages=[{"role": "system", "content": system_prompt}, *row.messages])


def _tokenise(rows: Sequence[Row], encoder: ChatEncoder, data: DataSettings) -> _Tokenised:
    done = _Tokenised([], [], [])
    faults: list[tuple[int, str]] = []
    with progress("tokenising", total=len(rows)) as bar:
        for start in range(0, len(rows), BATCH_ROWS):
            batch = rows[start : start + BATCH_ROWS]
            for row, encoded in _encode(batch, encoder, data.mask_prompt, faults):
                length = len(encoded[0])
                if length > data.max_seq_length:
                    detail = f"{length} tokens; data.max_seq_length is {data.max_seq_length}"
                    done.too_long.append(Unused(row, "too_long", detail))
                else:
                    done.rows.append(row)
                    done.tokens.append(encoded)
            bar.advance(len(batch))
    if faults:
        raise bad_rows_error(data.source, faults)
    return done


def _encode(
    batch: Sequence[Row], encoder: ChatEncoder, mask_prompt: bool, faults: list[tuple[int, str]]
) -> Iterator[tuple[Row, TokenRow]]:
    """A batch at once; row by row only when the template refuses one of it, to name that one's line."""
    try:
        yield from zip(batch, encoder.rows([row.messages for row in batch], mask_prompt), strict=True)
    except TemplateError:
        for row in batch:
            try:
                yield row, encoder.rows([row.messages], mask_prompt)[0]
            except TemplateError as error:
                faults.append((row.line, str(error)))


def _check_accounts(
    read: Sequence[Row], done: _Tokenised, unused: Sequence[Unused], data: DataSettings
) -> None:
    lines = sorted([row.line for row in done.rows] + [one.row.line for one in unused])
    if lines != [row.line for row in read]:
        raise AssertionError(f"{len(read)} rows read, but {len(done.rows)} used and {len(unused)} not")
    if len(done.rows) < len(SPLITS):
        too_long = f"{len(done.too_long)} were over data.max_seq_length={data.max_seq_length}"
        raise InputError(
            f"{data.source}: {len(done.rows)} usable rows of {len(read)} read ({too_long}); training, "
            f"validation and test need one each: give at least {len(SPLITS)} different rows that fit"
        )


def _rejected(one: Unused) -> dict[str, Any]:
    text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in one.row.messages)
    return {"line": one.row.line, "reason": f"{one.kind}: {one.detail}", "text": text}
