"""Whether the layers below the adapted ones are computed once, and that doing so changes nothing.

What is decided follows from settings and rows alone, not from what lies on the disk: a run that is resumed,
or a trial that is trained again by itself, computes the same.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from tasks.config import TrainSettings
from tasks.home import cache_dir
from tasks.prepare.splits import TokenRows
from tasks.train.batches import collate, updates_per_epoch
from tasks.train.evaluating import evaluating
from tasks.train.prefix_cache import PrefixedRows, cache_bytes, open_prefixes
from tasks.train.substitution import inject, put_back, replace_prefix
from tasks.train.supervised import log_probabilities, supervised_logits

if TYPE_CHECKING:
    import mlx.nn as nn

log = logging.getLogger(__name__)

LEAST_PASSES = 1.25
"""Passes over the rows that are worth one pass to fill the cache, and its place on the disk."""

PROBE_ROWS = 2

TOLERANCES = {mx.float32: 1e-3, mx.float16: 2e-2, mx.bfloat16: 0.15}
"""Largest difference of log-probabilities: the same sums in another order, through all layers."""

Splits = Mapping[str, TokenRows]


def without_frozen_layers(
    model: nn.Module, splits: Splits, settings: TrainSettings, identity: Mapping[str, str]
) -> Splits:
    """Take the frozen layers out of the model where that pays; the rows then bring what those gave.

    The first rows are held to the plain forward pass. Where they differ, or the model's code does not
    allow it, or the disk has no room, model and rows stay as they are, with a warning.

    Args:
        model: with its adapter on.
        splits: "train" and "valid".
        identity: see `open_prefixes`.
    """
    depth = frozen_depth(settings, len(model.layers))
    if not depth or not _wanted(splits, settings):
        return splits
    try:
        _check_disk(cache_bytes(model, splits), settings)
        limit_bytes = int(settings.prefix_cache_gb * 1e9)
        prefix = open_prefixes(model, splits, [depth], identity, limit_bytes)[depth]
        prefixed = {
            name: PrefixedRows(rows.tokens, rows.offsets, rows.supervised, prefix.hidden[name], prefix.dtype)
            for name, rows in splits.items()
        }
        if (difference := _take_out(model, depth, prefixed["train"])) is None:
            log.info("%d of %d layers are frozen: computed once a row", depth, len(model.layers))
            return prefixed
        reason = f"log-probabilities differ by {difference:.2g}"
    except (OSError, ValueError, AttributeError, TypeError, IndexError, KeyError) as error:
        reason = str(error)
    log.warning("the frozen layers are computed in every step, which is slower: %s", reason)
    return splits


def frozen_depth(settings: TrainSettings, layers: int) -> int:
    """Layers below all that is trained; a soft prompt is below every layer."""
    if settings.method == "soft-prompt" or settings.num_layers == -1:
        return 0
    return layers - settings.num_layers


def _wanted(splits: Splits, settings: TrainSettings) -> bool:
    if settings.frozen_prefix != "auto":
        return settings.frozen_prefix == "always"
    train, valid = splits["train"], splits["valid"]
    epoch = updates_per_epoch(train, settings.batch_size, settings.accumulation_steps)
    steps = min(settings.epochs * epoch, settings.max_steps or math.inf)
    validations = math.ceil(steps / settings.steps_per_eval) + 1
    used = steps / epoch * len(train.tokens) + validations * len(valid.tokens)
    return used >= LEAST_PASSES * (len(train.tokens) + len(valid.tokens))


def _check_disk(needed_bytes: int, settings: TrainSettings) -> None:
    """Refuse what does not fit.

    Raises:
        OSError: under the setting's limit or on the disk.
    """
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    needed = f"{needed_bytes / 1e9:.1f} GB are needed"
    if needed_bytes > settings.prefix_cache_gb * 1e9:
        raise OSError(f"{needed}, train.prefix_cache_gb is {settings.prefix_cache_gb:g}")
    if needed_bytes > 0.9 * (free := shutil.disk_usage(folder).free):
        raise OSError(f"{needed} on the disk of {folder}, {free / 1e9:.1f} GB are free")


def _take_out(model: nn.Module, depth: int, rows: PrefixedRows) -> float | None:
    """Replace the frozen layers if that changes nothing; else leave them, and say by how much it would."""
    batch = collate(rows, np.flatnonzero(rows.supervised_counts)[:PROBE_ROWS])
    with evaluating(model):
        plain = log_probabilities(supervised_logits(model, batch.inputs, batch.positions))
        taken = replace_prefix(model, depth)
        try:
            if batch.hidden is not None:
                inject(model, batch.hidden)
            injected = log_probabilities(supervised_logits(model, batch.inputs, batch.positions))
            difference = float(mx.abs(plain - injected).max())
        except BaseException:
            put_back(model, taken)
            raise
    if difference <= TOLERANCES[rows.dtype]:
        return None
    put_back(model, taken)
    return difference
