"""The frozen prefix of a model, computed once per row and kept on disk.

With the last k of L layers adapted, the hidden states that enter layer L - k are a fixed function of the
rows. They are computed in one pass, for several depths at once where a search asks for them, and read
back memory-mapped by every epoch, every validation and every trial after it.

    <cache>/prefix/<key>/hidden         (tokens, hidden), row after row, without padding, in the model's dtype
    <cache>/prefix/<key>/inputs.json    what the key is made of, and the shape

A key stands for base weights, rows and depth, so each split has a cache of its own. A cache is published
by one rename, so a half-built one is never found; `prefix_room` holds the locks and makes room.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from tasks.models.device import own_memory_bytes
from tasks.prepare.splits import TokenRows
from tasks.progress import progress
from tasks.publish import fingerprint, publishing, write_json
from tasks.train.prefix_room import building, make_room, prefix_folder
from tasks.train.substitution import Hear, UnfitError, listening

if TYPE_CHECKING:
    import mlx.nn as nn

BATCH_TOKENS = 4096
"""Padded tokens of one forward pass while a cache is built: a size that keeps any machine busy."""

LEAST_TOKENS = 512
"""A forward pass takes this many, however unequal the rows."""

PADDED_SHARE = 0.1
"""Of a row's tokens, how much padding it gets at most in a larger forward pass.

With 60 rows (log-normal lengths, mean 120) batches that only keep to `BATCH_TOKENS` compute 43% more tokens
than there are; kept to this share, 5% more.
"""

STORED: dict[mx.Dtype, tuple[mx.Dtype, type[np.generic]]] = {
    mx.float32: (mx.float32, np.float32),
    mx.float16: (mx.float16, np.float16),
    mx.bfloat16: (mx.uint16, np.uint16),
}
"""As what MLX and numpy hold a dtype; numpy has no bfloat16, so its bits are kept."""

GPU_SHARE = 0.1
"""Of a GPU's own memory, what the hidden states of one split may take."""

HIDDEN_FILE = "hidden"
INPUTS_FILE = "inputs.json"


@dataclass(frozen=True)
class Prefix:
    """The hidden states entering one layer, of rows laid end to end.

    Attributes:
        hidden: (tokens, hidden) on disk, in the order of `TokenRows.tokens`, as numpy holds `dtype`.
        dtype: of the model's arithmetic.
        on_gpu: the same in the memory of a GPU that has its own, where there is plenty of it: the way there
            is ten times slower than reading in it, and would cost a step on a fast GPU a third more.
    """

    hidden: NDArray[Any]
    dtype: mx.Dtype
    on_gpu: mx.array | None = None


@dataclass(frozen=True)
class PrefixedRows(TokenRows):
    """Rows that bring the hidden states entering the first layer that is not frozen.

    Attributes:
        prefix: of the rows that are used, in their order.
        starts: (rows,) where each row's states begin in `prefix`; -1 for a row that is not used.
    """

    prefix: Prefix
    starts: NDArray[np.int64]

    def first(self, count: int) -> PrefixedRows:
        """The first `count` rows, or all when there are fewer."""
        rows = super().first(count)
        return PrefixedRows(rows.tokens, rows.offsets, rows.supervised, self.prefix, self.starts[:count])

    def padded_hidden(self, indices: NDArray[np.int64], length: int) -> mx.array:
        """(rows, length, hidden) of some rows, cut or padded with zeros on the right to `length`.

        Raises:
            IndexError: of one of them the hidden states were not computed.
        """
        if (self.starts[indices] < 0).any():
            raise IndexError(f"among rows {indices.tolist()} are some without hidden states: a wrong count")
        if self.prefix.on_gpu is not None:
            places = self.starts[indices][:, None] + np.minimum(
                np.arange(length), self.lengths[indices][:, None] - 1
            )
            return self.prefix.on_gpu[mx.array(places)]  # what stands where rows are padded does not matter
        held, _ = STORED[self.prefix.dtype]
        # Of zeros that MLX has made already, numpy gives a view: the rows are copied once, from the mapped
        # file into MLX's memory. On the CPU's stream, which never waits for a step on the GPU.
        padded = mx.zeros((len(indices), length, self.prefix.hidden.shape[1]), held, stream=mx.cpu)
        mx.eval(padded)
        values = np.array(padded, copy=False)
        for place, index in enumerate(indices):
            count = min(int(self.offsets[index + 1] - self.offsets[index]), length)
            start = self.starts[index]
            values[place, :count] = self.prefix.hidden[start : start + count]
        return padded.view(self.prefix.dtype)


def prefixed(rows: TokenRows, used: NDArray[np.int64], prefix: Prefix) -> PrefixedRows:
    """Rows of which those `used`, ascending, have their hidden states in `prefix`."""
    prefix = replace(prefix, on_gpu=_on_gpu(prefix))
    starts = np.full(len(rows), -1, np.int64)
    starts[used] = np.cumsum(rows.lengths[used]) - rows.lengths[used]
    return PrefixedRows(rows.tokens, rows.offsets, rows.supervised, prefix, starts)


def _on_gpu(prefix: Prefix) -> mx.array | None:
    if not 0 < prefix.hidden.nbytes <= GPU_SHARE * own_memory_bytes():
        return None
    array = mx.array(prefix.hidden).view(prefix.dtype)
    mx.eval(array)
    return array


def only(rows: TokenRows, used: NDArray[np.int64]) -> TokenRows:
    """Those rows alone, laid end to end."""
    if len(used) == len(rows):
        return rows
    kept = np.zeros(len(rows), np.bool_)
    kept[used] = True
    tokens = np.repeat(kept, rows.lengths)
    offsets = np.concatenate([[0], np.cumsum(rows.lengths[used])])
    return TokenRows(rows.tokens[tokens], offsets, rows.supervised[tokens])


class PrefixCache:
    """The caches of one base model.

    Args:
        model: the base, without adapters below the deepest depth, in evaluation mode or not.
        identity: fingerprint of the base weights, and whatever else decides its arithmetic.
        limit_bytes: of all caches of all models together; the least recently used give way.
    """

    def __init__(self, model: nn.Module, identity: Mapping[str, Any], limit_bytes: int) -> None:
        self.model, self.identity, self.limit_bytes = model, identity, limit_bytes
        self._keep: set[Path] = set()

    def open(self, name: str, rows: TokenRows, depths: Collection[int]) -> dict[int, Prefix]:
        """Find the caches of these depths, or build all that are not there, in one pass over the rows.

        What this object has opened does not give way to what it opens later.

        Args:
            name: of the rows, for whoever watches.
            rows: all of them are computed.

        Raises:
            OSError: the disk has no room. Nothing is left behind.
            UnfitError: the model's code does not allow it.
        """
        with listening(self.model, depths) as hear:
            targets = self._targets(hear, rows, depths)
            self._keep |= {target.path for target in targets.values()}
            found = _found(targets)
            if found.keys() == targets.keys():
                return found
            with building((target.path for target in targets.values()), f"frozen layers, {name}"):
                found = _found(targets)  # by another process, before it released the locks
                missing = {depth: target for depth, target in targets.items() if depth not in found}
                if missing:
                    make_room(sum(each.size_bytes for each in missing.values()), self.limit_bytes, self._keep)
                    _build(hear, name, rows, missing)
                return _found(targets)

    def _targets(self, hear: Hear, rows: TokenRows, depths: Collection[int]) -> dict[int, _Target]:
        digest = hashlib.sha256(rows.tokens.tobytes() + rows.offsets.tobytes()).hexdigest()[:16]
        probe = hear(mx.zeros((1, 1), mx.int32))  # only shape and dtype are looked at: nothing is computed
        targets = {}
        for depth in depths:
            width, dtype = probe[depth].shape[-1], probe[depth].dtype
            if dtype not in STORED:
                raise UnfitError(f"its hidden states are {dtype}")
            inputs = {**self.identity, "rows": digest, "depth": depth, "dtype": str(dtype), "hidden": width}
            inputs["batches"] = [BATCH_TOKENS, LEAST_TOKENS, PADDED_SHARE]  # they decide the rounding
            targets[depth] = _Target(inputs, (len(rows.tokens), width), dtype)
        return targets


@dataclass(frozen=True)
class _Target:
    """Where the hidden states of some rows at one depth lie, or will."""

    inputs: Mapping[str, Any]
    shape: tuple[int, int]
    dtype: mx.Dtype

    @property
    def path(self) -> Path:
        return prefix_folder() / fingerprint(self.inputs)

    @property
    def size_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.size


def _found(targets: Mapping[int, _Target]) -> dict[int, Prefix]:
    """Those that are there, used now as far as eviction is concerned."""
    found = {}
    for depth, target in targets.items():
        with suppress(FileNotFoundError):  # another process may remove it at any time
            file = target.path / HIDDEN_FILE
            if file.stat().st_size == target.size_bytes:  # of a shorter file, reading would kill the process
                hidden = np.memmap(file, STORED[target.dtype][1], "r", shape=target.shape)
                os.utime(target.path)
                found[depth] = Prefix(hidden, target.dtype)
    return found


def _build(hear: Hear, name: str, rows: TokenRows, targets: Mapping[int, _Target]) -> None:
    with ExitStack() as stack:
        files = {}
        for depth, target in targets.items():
            shutil.rmtree(target.path, ignore_errors=True)  # a damaged one, or it would have been found
            draft = stack.enter_context(publishing(target.path))
            write_json(draft / INPUTS_FILE, {"name": name, **target.inputs})
            files[depth] = stack.enter_context((draft / HIDDEN_FILE).open("wb"))
            files[depth].truncate(target.size_bytes)  # what it will take counts from now on
        bar = stack.enter_context(progress(f"frozen layers, {name}", total=len(rows)))
        for batch, hidden in _computed(hear, rows, targets):
            for depth, array in hidden.items():
                _write(files[depth], np.array(array, copy=False), rows, batch)
            bar.advance(len(batch))


def _computed(
    hear: Hear, rows: TokenRows, depths: Iterable[int]
) -> Iterator[tuple[NDArray[np.int64], dict[int, mx.array]]]:
    """Batches of rows and, by depth, their hidden states (batch, length, hidden) as they are stored.

    One batch is computed while whoever asks is writing the batch before it.
    """
    before: tuple[NDArray[np.int64], dict[int, mx.array]] | None = None
    for batch in length_batches(rows.lengths, BATCH_TOKENS):
        tokens, _ = rows.padded(batch, int(rows.lengths[batch].max()))
        heard = hear(mx.array(tokens))
        hidden = {depth: heard[depth].view(STORED[heard[depth].dtype][0]) for depth in depths}
        mx.async_eval(*hidden.values())
        if before:
            yield before
        before = batch, hidden
    if before:
        yield before


def length_batches(lengths: NDArray[np.int64], tokens: int) -> list[NDArray[np.int64]]:
    """Row indices in order of length, in batches of at most `tokens` padded tokens, one row at least.

    Rows that are much shorter than the longest of a batch are in it only to make up `LEAST_TOKENS`.
    """
    order = np.argsort(lengths, kind="stable")
    batches: list[NDArray[np.int64]] = []
    start = 0
    while start < len(order):
        close = (1 + PADDED_SHARE) * lengths[order[start]]
        stop = start + 1
        while stop < len(order):
            longest = int(lengths[order[stop]])
            padded = longest * (stop + 1 - start)
            if padded > (tokens if longest <= close else min(tokens, LEAST_TOKENS)):
                break
            stop += 1
        batches.append(order[start:stop])
        start = stop
    return batches


def _write(file: BinaryIO, values: NDArray[Any], rows: TokenRows, batch: NDArray[np.int64]) -> None:
    """Put the rows of a batch, without padding, in their places.

    Not through a map: on a full disk a map ends the process (SIGBUS), where a write raises OSError.
    """
    token_bytes = values.shape[-1] * values.itemsize
    for row, states in zip(batch, values, strict=True):
        start, stop = int(rows.offsets[row]), int(rows.offsets[row + 1])
        file.seek(start * token_bytes)
        file.write(memoryview(states[: stop - start]).cast("B"))
