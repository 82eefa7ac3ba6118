"""Whether the layers below the adapted ones are computed once, and that doing so changes nothing.

What is decided follows from settings and rows alone, not from what lies on the disk: a run that is resumed,
or a trial that is trained again by itself, computes the same. Each split is decided for itself; the frozen
layers leave the memory where no split needs them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from tasks.config import TrainSettings
from tasks.models.device import device_name
from tasks.models.folder import ModelFolder
from tasks.prepare.splits import TokenRows
from tasks.train.batches import collate, epoch_batches, updates_per_epoch
from tasks.train.evaluating import evaluating
from tasks.train.loop import total_steps
from tasks.train.prefix_cache import Prefix, PrefixCache, PrefixedRows, only, prefixed
from tasks.train.soft_prompt import KIND as SOFT_PROMPT
from tasks.train.substitution import UnfitError, inject, replace_prefix, standing_in
from tasks.train.supervised import log_probabilities, supervised_logits

if TYPE_CHECKING:
    import mlx.nn as nn

log = logging.getLogger(__name__)

LEAST_PASSES = 1.25
"""Passes over the training rows that are worth one pass to fill the cache, and its place on the disk."""

LEAST_VALIDATIONS = 2

PROBE_ROWS = 2

PROBE_POSITIONS = 64
"""Positions of these that are compared: all of two long rows would take gigabytes of logits."""

TOLERANCES = {mx.float32: 1e-3, mx.float16: 2e-2, mx.bfloat16: 0.15}
"""Largest difference of log-probabilities: the same sums in another order, through all layers."""

Splits = Mapping[str, TokenRows]
Used = Mapping[str, NDArray[np.int64]]


def without_frozen_layers(
    model: nn.Module, splits: Splits, settings: TrainSettings, identity: Mapping[str, Any]
) -> Splits:
    """Take the frozen layers out of the model where that pays; the rows then bring what those gave.

    The first rows of each split are held to the plain forward pass. A split where they differ, or that the
    disk has no room for, stays as it is, with a warning, and the layers then run for its rows.

    Args:
        model: with its adapter on.
        splits: "train" and "valid".
        identity: of the base model, see `base_identity`.
    """
    depth = frozen_depth(settings, len(model.layers))
    wanted = _wanted(splits, settings) if depth else {}
    cache = PrefixCache(model, identity, _limit_bytes(settings))
    ready = _prefixed(cache, splits, wanted, depth)
    if not ready:
        return splits
    replace_prefix(model, depth, keep=ready.keys() != splits.keys())
    log.info("%d of %d layers are frozen: computed once a row of %s", depth, len(model.layers), _names(ready))
    return {**splits, **ready}


@contextmanager
def for_measuring(
    model: nn.Module, rows: TokenRows, depth: int, settings: TrainSettings, identity: Mapping[str, Any]
) -> Iterator[TokenRows]:
    """Rows whose loss is measured of a base and of what was trained on it, by one path and in less time.

    Within the block the frozen layers run for no row that brings what they gave; after it the model is as
    before. As with `without_frozen_layers`, the rows stay as they are where that cannot be.

    Args:
        depth: layers, from the first, that are equal in all models that are measured (`untouched_layers`).
        settings: `frozen_prefix` and `prefix_cache_gb` are read.
        identity: of the base model, see `base_identity`.
    """
    possible = depth and settings.frozen_prefix != "never" and rows.supervised.any()
    wanted = {"test": np.arange(len(rows))} if possible else {}
    cache = PrefixCache(model, identity, _limit_bytes(settings))
    ready = _prefixed(cache, {"test": rows}, wanted, depth)
    if not ready:
        yield rows
        return
    with standing_in(model, depth):
        yield ready["test"]


def record_prefixes(
    model: nn.Module,
    splits: Splits,
    settings: TrainSettings,
    num_layers: Sequence[int],
    identity: Mapping[str, Any],
) -> None:
    """Compute what trainings that differ in `num_layers` will look for, in one pass over each split.

    Where the disk has no room for all depths, the deepest stay, which save the most.

    Args:
        model: the base.
        splits: "train" and "valid".
        settings: of the trainings.
    """
    trials = [settings.model_copy(update={"num_layers": number}) for number in num_layers]
    depths = sorted({depth for trial in trials if (depth := frozen_depth(trial, len(model.layers)))})
    cache = PrefixCache(model, identity, _limit_bytes(settings))
    for name, used in _smallest_first(splits, _wanted(splits, settings) if depths else {}):
        rows, possible = only(splits[name], used), list(depths)
        try:
            while possible and not _opened(cache, name, rows, possible):
                del possible[0]
        except UnfitError as error:
            _warn(name, error)
            return


def frozen_depth(settings: TrainSettings, layers: int) -> int:
    """Layers below all that is trained; a soft prompt is below every layer."""
    if settings.method == SOFT_PROMPT or settings.num_layers == -1:
        return 0
    return layers - settings.num_layers


def untouched_layers(config: Mapping[str, Any], layers: int) -> int:
    """The same of a finished adapter, from its `adapter_config.json`."""
    if config["fine_tune_type"] == SOFT_PROMPT or config["num_layers"] == -1:
        return 0
    return int(layers - config["num_layers"])


def base_identity(base: ModelFolder) -> dict[str, str]:
    """What the hidden states of given tokens depend on, beside the depth."""
    packages = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}
    return {"base": base.fingerprint, "device": device_name(), **packages}


def worth_keeping(splits: Splits, settings: TrainSettings) -> set[str]:
    """The splits whose frozen layers are computed once, where there are any."""
    return set(_wanted(splits, settings))


def _wanted(splits: Splits, settings: TrainSettings) -> Used:
    """By split whose hidden states are worth keeping, the rows that are used at all, ascending."""
    train, valid = splits["train"], splits["valid"]
    epoch = updates_per_epoch(train, settings.batch_size, settings.accumulation_steps)
    steps = total_steps(train, settings)
    validations = math.ceil(steps / settings.steps_per_eval) + 1
    pays = {"train": steps >= LEAST_PASSES * epoch, "valid": validations >= LEAST_VALIDATIONS}
    used = {"train": _trained_rows(train, settings, steps), "valid": _validated_rows(valid, settings)}
    if settings.frozen_prefix == "auto":
        for name in (name for name, worth in pays.items() if not worth):
            log.info("the frozen layers run in every step for the %s rows: used too seldom to keep", name)
    chosen = {"auto": pays, "always": dict.fromkeys(pays, True), "never": {}}[settings.frozen_prefix]
    return {name: rows for name, rows in used.items() if chosen.get(name) and len(rows)}


def _trained_rows(train: TokenRows, settings: TrainSettings, steps: int) -> NDArray[np.int64]:
    """The rows of the first `steps` updates."""
    teaching = np.flatnonzero(train.supervised_counts)
    if steps >= updates_per_epoch(train, settings.batch_size, settings.accumulation_steps):
        return teaching
    batches = epoch_batches(train.lengths[teaching], settings.batch_size, settings.seed, epoch=0)
    return np.sort(teaching[np.concatenate(batches[: steps * settings.accumulation_steps])])


def _validated_rows(valid: TokenRows, settings: TrainSettings) -> NDArray[np.int64]:
    rows = valid.first(settings.valid_rows) if settings.valid_rows else valid
    return np.arange(len(rows) if rows.supervised.any() else 0)


def _prefixed(cache: PrefixCache, splits: Splits, wanted: Used, depth: int) -> dict[str, PrefixedRows]:
    """The rows of each wanted split with their hidden states, but for those that cannot have them."""
    ready = {}
    try:
        for name, used in _smallest_first(splits, wanted):
            if opened := _opened(cache, name, only(splits[name], used), [depth]):
                rows = prefixed(splits[name], used, opened[depth])
                if _changes_nothing(cache.model, name, rows, used, depth):
                    ready[name] = rows
    except UnfitError as error:
        _warn(_names(wanted), error)
        return {}
    return ready


def _opened(cache: PrefixCache, name: str, rows: TokenRows, depths: Sequence[int]) -> dict[int, Prefix]:
    """What the cache gives, or nothing and a warning when the disk has no room."""
    try:
        return cache.open(name, rows, depths)
    except OSError as error:
        _warn(name, error)
        return {}


def _changes_nothing(
    model: nn.Module, name: str, rows: PrefixedRows, used: NDArray[np.int64], depth: int
) -> bool:
    """Whether the first rows give the same with the cached hidden states as without; if not, a warning.

    Raises:
        UnfitError: the model's code does not allow the comparison.
    """
    batch = collate(rows, used[rows.supervised_counts[used] > 0][:PROBE_ROWS])
    positions = batch.positions[:: math.ceil(len(batch.positions) / PROBE_POSITIONS)]
    try:
        with evaluating(model):
            plain = log_probabilities(supervised_logits(model, batch.inputs, positions))
            with standing_in(model, depth):
                inject(model, batch.hidden)
                cached = log_probabilities(supervised_logits(model, batch.inputs, positions))
            difference = float(mx.abs(plain - cached).max())
    except (AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise UnfitError(str(error)) from error
    if difference <= TOLERANCES[rows.prefix.dtype]:
        return True
    _warn(name, f"log-probabilities differ by {difference:.2g}")
    return False


def _smallest_first(splits: Splits, wanted: Used) -> list[tuple[str, NDArray[np.int64]]]:
    """Where the room ends, it ends with the largest."""
    return sorted(wanted.items(), key=lambda each: int(splits[each[0]].lengths[each[1]].sum()))


def _limit_bytes(settings: TrainSettings) -> int:
    return int(settings.prefix_cache_gb * 1e9)


def _names(splits: Iterable[str]) -> str:
    return " and ".join(sorted(splits))


def _warn(names: str, reason: object) -> None:
    log.warning("the frozen layers run each time for the %s rows, which is slower: %s", names, reason)
