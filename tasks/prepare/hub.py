"""Rows of a dataset on the Hugging Face hub, through its own `datasets` library."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from typing import Any

from tasks.config import DataSettings
from tasks.errors import InputError, OutageError
from tasks.patience import may_heal
from tasks.prepare.files import READING_ORDER, Part, split_of
from tasks.prepare.formats import Forms
from tasks.prepare.parquet import BATCH_ROWS, batch_rows, table_columns
from tasks.prepare.rows import Stream


def check_hub(data: DataSettings) -> None:
    """Refuse early where the library is missing; nothing is fetched."""
    if importlib.util.find_spec("datasets") is None:
        raise InputError(
            f"data.source = '{data.source}': is not a path here, and for hub datasets the package 'datasets' "
            "is needed: pip install 'tunesmith[hub]'"
        )


def read_hub(data: DataSettings, forms: Forms) -> Stream:
    """The rows of a dataset's splits; a row's line is its number in its split, from 1.

    Splits whose names begin with train, validation (or valid, val, dev) or test are read as those; a
    dataset with no such split is read whole.

    Raises:
        InputError: the dataset cannot be had, or has no columns that a row could be made of.
    """
    splits = _load(data)
    parts = _parts([*splits])
    for name in splits:
        if name not in parts:
            yield Part(name=name).note(1, "file", f"split '{name}'")
    for name, part in parts.items():
        columns, notes = table_columns(part, forms, splits[name].column_names, data.source)
        yield from notes
        batches = splits[name].select_columns(columns).with_format("arrow").iter(BATCH_ROWS)
        for number, batch in enumerate(batches):
            yield from batch_rows(part, forms, batch, number * BATCH_ROWS)


def hub_inputs(data: DataSettings) -> dict[str, Any]:
    """What the rows depend on: the splits' names and contents."""
    splits = _load(data)
    parts = _parts([*splits])
    return {"splits": [[part.name, part.split, _digest(splits[name])] for name, part in parts.items()]}


def _load(data: DataSettings) -> dict[str, Any]:
    """The splits by name, downloaded where they are not in the library's cache."""
    check_hub(data)
    from datasets import load_dataset

    try:
        return dict(load_dataset(data.source, data.subset, revision=data.revision))
    except Exception as error:  # of a dozen unrelated classes; none says more than its text
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise (OutageError if may_heal(error) else InputError)(
            f"data.source = '{data.source}': is not a path here, and the hub dataset cannot be loaded "
            f"({reason}); check the name, data.subset and data.revision, or go online; for a gated one run "
            "'hf auth login'"
        ) from None


def _parts(names: list[str]) -> dict[str, Part]:
    """The hub splits to be read, in order, and what their rows carry."""
    named = {name: split for name in names if (split := split_of(name))}
    read = named or dict.fromkeys(names)
    if set(read.values()) == {"train"}:  # nothing is held out: split by hash
        read = dict.fromkeys(read)
    ordered = sorted(read, key=lambda name: READING_ORDER.index(read[name]))
    return {name: Part(name=name if len(read) > 1 else "", split=read[name]) for name in ordered}


def _digest(dataset: Any) -> str:
    """SHA-256 of a split's columns and values, wherever the library keeps them."""
    import pyarrow

    digest = _Digest()
    table = dataset.data.table
    with pyarrow.ipc.new_stream(digest, table.schema.remove_metadata()) as stream:
        for batch in dataset.with_format("arrow").iter(BATCH_ROWS):
            stream.write(batch.replace_schema_metadata(None))
    return digest.sha256.hexdigest()


class _Digest(io.RawIOBase):
    """A file whose bytes are digested and forgotten."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return len(data)
