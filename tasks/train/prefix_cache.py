"""The frozen prefix of a model, computed once per row and kept on disk.

With the last k of L layers adapted, the hidden states that enter layer L - k are a fixed function of the
rows. They are computed in one pass, for several depths at once where a search asks for them, and read
back memory-mapped by every epoch, every validation and every trial after it.

    <cache>/prefix/<key>/<split>.hidden    (tokens, hidden), row after row, without padding, in the
                                           model's dtype
    <cache>/prefix/<key>/inputs.json       what the key is made of, and the shape

A cache is published by one rename, so a half-built one is never found; the least recently used are
removed when the size limit would be passed.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from tasks.home import cache_dir
from tasks.prepare.splits import TokenRows
from tasks.progress import progress
from tasks.publish import fingerprint, publishing, write_json
from tasks.train.evaluating import evaluating
from tasks.train.substitution import layers_of, listening

if TYPE_CHECKING:
    import mlx.nn as nn

log = logging.getLogger(__name__)

BATCH_TOKENS = 4096
"""Padded tokens of one forward pass while a cache is built: a size that keeps any machine busy."""

STORED = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16}
"""numpy has no bfloat16: its bits are kept."""

INPUTS_FILE = "inputs.json"


@dataclass(frozen=True)
class Prefix:
    """The hidden states entering layer `depth`, of every row of some splits.

    Attributes:
        hidden: by split, (tokens, hidden) on disk, in the order of `TokenRows.tokens`.
        dtype: of the model's arithmetic.
    """

    depth: int
    hidden: Mapping[str, NDArray[Any]]
    dtype: mx.Dtype


@dataclass(frozen=True)
class PrefixedRows(TokenRows):
    """Rows that bring the hidden states entering the first layer that is not frozen.

    Attributes:
        hidden: (total, hidden) on disk, as numpy holds `dtype`.
        dtype: of the model's arithmetic.
    """

    hidden: NDArray[Any]
    dtype: mx.Dtype

    def first(self, count: int) -> PrefixedRows:
        """The first `count` rows, or all when there are fewer."""
        rows = super().first(count)
        return PrefixedRows(
            rows.tokens, rows.offsets, rows.supervised, self.hidden[: len(rows.tokens)], self.dtype
        )

    def padded_hidden(self, indices: NDArray[np.int64], length: int) -> mx.array:
        """(rows, length, hidden) of some rows, cut or padded with zeros on the right to `length`."""
        values = np.zeros((len(indices), length, self.hidden.shape[1]), self.hidden.dtype)
        for place, index in enumerate(indices):
            start = int(self.offsets[index])
            count = min(int(self.offsets[index + 1]) - start, length)
            values[place, :count] = self.hidden[start : start + count]
        return as_mlx(values, self.dtype)


def open_prefixes(
    model: nn.Module,
    splits: Mapping[str, TokenRows],
    depths: Sequence[int],
    identity: Mapping[str, Any],
    limit_bytes: int,
) -> dict[int, Prefix]:
    """Find the caches of these depths, or build those that are not there, all in one pass.

    Args:
        model: the base, without adapters below the deepest depth, in evaluation mode or not.
        identity: fingerprints of the base weights and of the prepared data, and the device.
        limit_bytes: of all caches together; the least recently used give way.

    Raises:
        OSError: the disk has no room.
    """
    dtype = _dtype_of(model)
    targets = {depth: cache_dir() / "prefix" / _key(identity, depth, dtype) for depth in depths}
    if missing := {depth: path for depth, path in targets.items() if not path.is_dir()}:
        width = _width(model, splits)
        size = sum(len(rows.tokens) for rows in splits.values()) * width * dtype.size
        make_room(size * len(missing), limit_bytes, keep=targets.values())
        with ExitStack() as stack:
            drafts = {depth: stack.enter_context(publishing(path)) for depth, path in missing.items()}
            for draft in drafts.values():
                write_json(draft / INPUTS_FILE, {**identity, "dtype": str(dtype), "hidden": width})
            for name, rows in splits.items():
                _record(model, name, rows, drafts, width, dtype)
    return {depth: _open(path, depth, splits, dtype) for depth, path in targets.items()}


def cache_bytes(model: nn.Module, splits: Mapping[str, TokenRows]) -> int:
    """What one depth of a cache takes on disk."""
    tokens = sum(len(rows.tokens) for rows in splits.values())
    return int(tokens * _width(model, splits) * _dtype_of(model).size)


def make_room(new_bytes: int, limit_bytes: int, keep: Any = ()) -> None:
    """Remove the least recently used caches until a new one fits under the limit.

    A cache that another process reads stays readable to it: its files are mapped.
    """
    folder = cache_dir() / "prefix"
    kept = {Path(path).name for path in keep}
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in found}
    total = sum(sizes.values())
    for path in sorted(found, key=lambda one: one.stat().st_mtime):
        if total + new_bytes <= limit_bytes:
            return
        if path.name not in kept and not path.name.startswith("."):
            log.info("removing the prefix cache %s (%.1f GB)", path.name, sizes[path] / 1e9)
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]


def length_batches(lengths: NDArray[np.int64], tokens: int) -> list[NDArray[np.int64]]:
    """Row indices in order of length, in batches of at most `tokens` padded tokens, one row at least."""
    order = np.argsort(lengths, kind="stable")
    batches: list[NDArray[np.int64]] = []
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and int(lengths[order[stop]]) * (stop + 1 - start) <= tokens:
            stop += 1
        batches.append(order[start:stop])
        start = stop
    return batches


def _record(
    model: nn.Module, name: str, rows: TokenRows, drafts: Mapping[int, Path], width: int, dtype: mx.Dtype
) -> None:
    stored = STORED[dtype]
    shape = (len(rows.tokens), width)
    maps = {
        depth: np.memmap(draft / f"{name}.hidden", stored, "w+", shape=shape)
        for depth, draft in drafts.items()
    }
    with (
        progress(f"frozen layers, {name}", total=len(rows)) as bar,
        evaluating(model),
        listening(model, list(drafts)) as heard,
    ):
        for batch in length_batches(rows.lengths, BATCH_TOKENS):
            tokens, _ = rows.padded(batch, int(rows.lengths[batch].max()))
            model(mx.array(tokens))
            mx.eval(*heard.values())
            for depth, hidden in heard.items():
                values = as_numpy(hidden)  # (batch, length, hidden)
                for place, row in enumerate(batch):
                    start, stop = rows.offsets[row], rows.offsets[row + 1]
                    maps[depth][start:stop] = values[place, : stop - start]
            heard.clear()
            bar.advance(len(batch))
    for array in maps.values():
        array.flush()


def as_numpy(array: mx.array) -> NDArray[Any]:
    """An MLX array as numpy holds it; of bfloat16 the bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def as_mlx(array: NDArray[Any], dtype: mx.Dtype) -> mx.array:
    """The reverse of `as_numpy`."""
    return mx.array(array).view(dtype) if dtype == mx.bfloat16 else mx.array(array)


def _open(path: Path, depth: int, splits: Mapping[str, TokenRows], dtype: mx.Dtype) -> Prefix:
    os.utime(path)  # used now, for the eviction
    hidden = {}
    for name, rows in splits.items():
        flat = np.memmap(path / f"{name}.hidden", STORED[dtype], "r")
        hidden[name] = flat.reshape(len(rows.tokens), -1)
    return Prefix(depth, hidden, dtype)


def _key(identity: Mapping[str, Any], depth: int, dtype: mx.Dtype) -> str:
    return fingerprint({**identity, "depth": depth, "dtype": str(dtype)})


def _dtype_of(model: nn.Module) -> mx.Dtype:
    """The dtype of the hidden states: that of the first norm, which no quantisation touches."""
    return _probe(model).dtype


def _width(model: nn.Module, splits: Mapping[str, TokenRows]) -> int:
    return int(_probe(model).shape[-1])


def _probe(model: nn.Module) -> mx.array:
    """The hidden states of one token at the last layer; only their shape and type are looked at."""
    last = len(layers_of(model)) - 1
    with listening(model, [last]) as heard:
        model(mx.zeros((1, 1), mx.int32))
    return heard[last]
