"""From a source of rows to training-ready tokens: read, choose, render, tokenise, split, report.

Rows pass through as a stream. Only what a row is known by stays in memory, so that the size of a
source is bounded by the disk. One thread reads and renders while the tokenizer works on the rows before.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tasks.config import DataSettings
from tasks.errors import InputError
from tasks.models.folder import ModelFolder
from tasks.prepare.account import REJECTED_FILE, Account
from tasks.prepare.chats import TEMPLATE_FILE, read_row
from tasks.prepare.choose import assign_splits, distinct, only, smallest_hashes, split_by, within_characters
from tasks.prepare.encoding import BATCH_ROWS, encoded_parts
from tasks.prepare.page import write_page
from tasks.prepare.report import token_figures
from tasks.prepare.rows import SPLITS, Stream
from tasks.prepare.sources import check_source, is_hub, read_source, source_inputs
from tasks.prepare.spool import Dealt, Spool, first_lines
from tasks.prepare.templates import template_source
from tasks.prepare.tokenise import ChatEncoder, chat_encoder, load_tokenizer
from tasks.progress import Bar, progress
from tasks.publish import StepOutput, output_folder, run_step, write_json
from tasks.tracking import Run

log = logging.getLogger(__name__)

SAMPLES = 5
REPORT_FILE, PAGE_FILE = "report.json", "report.html"
TOKENIZER_FILES = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab*")


def prepare_data(data: DataSettings, model: ModelFolder, run: Run | None = None) -> StepOutput:
    """Prepare a source for a model; models of the same tokenizer share the output.

    The folder holds `train.jsonl`, `valid.jsonl` and `test.jsonl` in mlx-lm's chat form,
    `tokens.safetensors` with the same rows in the same order, `rejected.jsonl` (every row not used),
    `report.json` and `report.html`, and `chat_template.jinja` where it is not the model's own. Report and
    rows not used are logged to the run, if one is given, and the data as its input.

    Raises:
        InputError: the source is missing or has bad rows, the model's tokenizer or template cannot be
            used, or fewer than three rows are left. Nothing is published then.
    """
    check_source(data)
    output = run_step("prepare", _inputs(data, model.path), lambda folder: _make(folder, data, model))
    if run is not None:
        report = output.read_json(REPORT_FILE)
        if reasons := report["reasons"].values():
            told = ", ".join(f"{reason['rows']:,} {reason['meaning']}" for reason in reasons)
            log.warning("prepare: not used: %s; which and why: %s", told, output.path / PAGE_FILE)
        if advice := report["guidance"]["advice"]:
            log.warning("prepare: %s", advice)
        run.set_tags({"tunesmith.data": output.fingerprint})
        run.log_files(output.path, "data", only=(REPORT_FILE, PAGE_FILE, REJECTED_FILE))
        run.log_dataset(output, report)
    return output


def prepared_folder(data: DataSettings, model: Path) -> Path | None:
    """Where the output of `prepare_data` lies for the model folder; None where it has not been made.

    Nothing is made or downloaded. A hub dataset counts as not prepared: only loading it says what it holds.
    """
    if is_hub(data):
        return None
    try:
        check_source(data)
        folder = output_folder("prepare", _inputs(data, model))
    except InputError:
        return None
    return folder if folder.is_dir() else None


def _inputs(data: DataSettings, model: Path) -> dict[str, Any]:
    with progress("looking at the rows"):
        source = source_inputs(data)
    return {
        "data": data.model_dump(mode="json", exclude={"source"}),
        "source": source,
        "tokenizer": tokenizer_digest(model),
    }


def inspect_data(data: DataSettings, model: ModelFolder) -> dict[str, Any]:
    """The report that `prepare_data` would write, whatever the rows are like; nothing is kept.

    Raises:
        InputError: as `prepare_data`, but not for bad or long rows: they are what is looked for.
    """
    check_source(data)
    lenient = {"on_bad_row": "skip", "on_long_row": data.on_long_row.replace("error", "drop")}
    data = data.model_copy(update=lenient)
    with TemporaryDirectory(prefix="tunesmith-") as folder:
        return _make(Path(folder), data, model)


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 of the names and contents of a model folder's tokenizer and chat template files."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _make(folder: Path, data: DataSettings, model: ModelFolder) -> dict[str, Any]:
    tokenizer = load_tokenizer(model.path)
    template, source = template_source(data.template, tokenizer)
    encoder = chat_encoder(tokenizer, source)
    if source is not None:
        (folder / TEMPLATE_FILE).write_text(source, encoding="utf-8")
    with Account(data, folder) as account, Spool(folder, data.seed) as spool:
        with progress("preparing rows") as bar:
            for part in encoded_parts(_chosen(data, account, bar), encoder, data):
                spool.add(part.sources, part.rows, part.encoded)
                account.put(part.unused, part.notes, part.sources)
        account.close(data.source)
        _check_enough(account, data)
        splits, moved = assign_splits(spool.shares, spool.given, data)
        dealt = spool.deal(splits, SAMPLES)
        report = {
            "source": Path(data.source).name,
            **account.figures(),
            "split_by": split_by(set(spool.given.tolist())),
            "rows_moved_to_fill_a_split": moved,
            **token_figures(data, dealt),
            "truncated": account.notes["truncated"],
            "template": template,
            "samples": _samples(folder, dealt, encoder, data.supervise),
        }
    if data.source == "stdlib":
        report["python"] = platform.python_version()
    write_json(folder / REPORT_FILE, report)
    write_page(report, folder / PAGE_FILE)
    counts = ", ".join(f"{int((splits == index).sum()):,} {name}" for index, name in enumerate(SPLITS))
    log.info("prepare: %s rows read, used: %s", f"{account.read:,}", counts)
    return report


def _chosen(data: DataSettings, account: Account, bar: Bar) -> Stream:
    """The rows to be used, and all others with the reason why not."""
    stream = _sifted(_with_progress(account.counting(read_source(data)), bar), data)
    if data.max_rows is None:
        return stream
    chosen = smallest_hashes(_sifted(read_source(data), data), data.max_rows, data.seed)
    return only(stream, chosen, f"data.max_rows is {data.max_rows}")


def _sifted(stream: Stream, data: DataSettings) -> Stream:
    return distinct(within_characters(stream, data.min_chars, data.max_chars), data.near_duplicates)


def _with_progress(stream: Stream, bar: Bar) -> Stream:
    for count, item in enumerate(stream, start=1):
        yield item
        if count % BATCH_ROWS == 0:
            bar.advance(BATCH_ROWS)


def _check_enough(account: Account, data: DataSettings) -> None:
    if account.used < len(SPLITS):
        reasons = ", ".join(f"{count} {kind}" for kind, count in account.reasons.most_common())
        raise InputError(
            f"{data.source}: {account.used} usable rows of {account.read} read ({reasons or 'no others'}); "
            f"training, validation and test need one each: give at least {len(SPLITS)} different rows"
        )


def _samples(folder: Path, dealt: Dealt, encoder: ChatEncoder, supervise: str) -> list[dict[str, Any]]:
    """The first training rows as they are learnt, with their places in the source."""
    written = first_lines(folder / "train.jsonl", SAMPLES)
    return [
        {"file": file, "line": line, "pieces": encoder.shown(read_row(row), supervise)}
        for (file, line), row in zip(dealt.places, written, strict=True)
    ]
