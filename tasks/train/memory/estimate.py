"""The peak memory of a run before it starts: from a model's config, the settings and the rows' sizes alone.

Each kind of work of a run, a phase, is traced through the product's own modules without weights (`traced_step`),
fused as `mx.compile` does (`fusion`) and replayed as MLX carries it out (`replay`). The run's peak is that of
its largest phase.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tasks.config import TrainSettings
from tasks.models.device import on_gpu, own_memory_bytes
from tasks.models.folder import ModelFolder
from tasks.prepare.splits import load_splits
from tasks.publish import StepOutput
from tasks.train.adapters import adapter_weights
from tasks.train.frozen_prefix import LEAST_PASSES, frozen_depth, worth_keeping
from tasks.train.memory.backends import pace
from tasks.train.memory.calibration import Calibration, calibration
from tasks.train.memory.fusion import fused
from tasks.train.memory.graph import Graph, Value
from tasks.train.memory.replay import Moment, highest
from tasks.train.memory.row_sizes import RowSizes
from tasks.train.memory.skeleton import skeleton, with_adapter
from tasks.train.memory.traced_step import (
    BATCH,
    GRADIENT,
    OPTIMIZER,
    TRAINED,
    WEIGHT,
    BatchShape,
    apply_graph,
    embedded,
    first_look_graph,
    forward_graph,
    gradient_graph,
    optimizer_bytes,
    update_graph,
    validation_graph,
)
from tasks.train.prefix_cache import BATCH_TOKENS, GPU_SHARE
from tasks.train.quantised_base import check_base
from tasks.train.soft_prompt import KIND as SOFT_PROMPT
from tasks.train.substitution import UnfitError, replace_prefix

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "cache", "slack")

OF_INPUT = {
    WEIGHT: "weights",
    TRAINED: "adapters",
    GRADIENT: "gradients",
    OPTIMIZER: "optimizer",
    BATCH: "cache",
}

LOOKED_AT = 2
"""Rows that are compared before the first step: PROBE_ROWS of `supervised` and of `frozen_prefix`."""


@dataclass(frozen=True)
class Breakdown:
    """Bytes at one moment, by what takes them.

    Attributes:
        weights: of the base that are in memory.
        adapters: what is trained, and the best of it so far.
        cache: batches under way with their hidden states, and those kept on a GPU.
        slack: what measured runs took beyond the replay.
    """

    weights: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    cache: int = 0
    slack: int = 0

    @property
    def bytes(self) -> int:
        """The sum."""
        return sum(getattr(self, part) for part in PARTS)

    def parts(self) -> dict[str, int]:
        """By name."""
        return {part: getattr(self, part) for part in PARTS}


@dataclass(frozen=True)
class MemoryEstimate:
    """The predicted peak of a run.

    Attributes:
        phases: by name, each at its own highest moment.
        phase: the one whose peak is the run's.
    """

    phases: Mapping[str, Breakdown]

    @property
    def phase(self) -> str:
        """Of the highest peak."""
        return max(self.phases, key=lambda name: self.phases[name].bytes)

    @property
    def at_peak(self) -> Breakdown:
        """What is held then."""
        return self.phases[self.phase]

    @property
    def peak_bytes(self) -> int:
        """The highest of all phases."""
        return self.at_peak.bytes


@dataclass(frozen=True)
class Prefixed:
    """Which splits' frozen layers are computed once."""

    train: bool
    valid: bool


def estimate_memory(settings: TrainSettings, model: ModelFolder, data: StepOutput) -> MemoryEstimate:
    """Predict the peak of training `settings` on prepared data: its largest batch decides.

    Raises:
        InputError: the model does not allow the settings.
    """
    splits = load_splits(data.path)
    valid = splits["valid"].first(settings.valid_rows) if settings.valid_rows else splits["valid"]
    layers = int(model.language_config()["num_hidden_layers"])
    kept = worth_keeping(splits, settings) if frozen_depth(settings, layers) else set()
    return estimate_from_config(
        settings,
        model.config(),
        RowSizes.of(splits["train"]),
        RowSizes.of(valid),
        Prefixed("train" in kept, "valid" in kept),
    )


def estimate_from_config(
    settings: TrainSettings,
    config: Mapping[str, Any],
    train: RowSizes,
    valid: RowSizes | None = None,
    prefixed: Prefixed | None = None,
    calibrated: Calibration | None = None,
) -> MemoryEstimate:
    """The same from a model's `config.json` and the sizes of rows, without weights or rows.

    Args:
        valid: like the training rows when left out.
        prefixed: when left out, what `train.frozen_prefix` decides for runs of whole epochs.
        calibrated: this machine's when left out.
    """
    check_base(settings.method, config)
    run = _Run(settings, config, train, valid or train, prefixed or _usual(settings))
    calibrated = calibrated or calibration()
    phases = {name: calibrated.applied(made()) for name, made in run.phases().items()}
    return MemoryEstimate(phases)


def _usual(settings: TrainSettings) -> Prefixed:
    if settings.frozen_prefix != "auto":
        return Prefixed(*[settings.frozen_prefix == "always"] * 2)
    return Prefixed(settings.epochs >= LEAST_PASSES, valid=True)


class _Run:
    """What is the same in all phases of a run."""

    def __init__(
        self,
        settings: TrainSettings,
        config: Mapping[str, Any],
        train: RowSizes,
        valid: RowSizes,
        prefixed: Prefixed,
    ) -> None:
        self.settings, self.config = settings, config
        in_front = settings.prompt_tokens if settings.method == SOFT_PROMPT else 0
        self.train, self.valid = train.longer(in_front), valid.longer(in_front)
        self.base = skeleton(config)
        self.depth = frozen_depth(settings, len(self.base.layers))
        self.prefixed = prefixed if self.depth else Prefixed(False, False)
        self.vocabulary = _vocabulary(config)

    def phases(self) -> dict[str, Callable[[], Breakdown]]:
        """What is done in a training, by name, in order."""
        phases: dict[str, Callable[[], Breakdown]] = {}
        if self.prefixed.train or self.prefixed.valid:
            phases["building the frozen prefix"] = self._building
        phases["first look"] = self._first_look
        phases["validation"] = self._validation
        phases["training"] = self._training
        return phases

    def _building(self) -> Breakdown:
        longest = int(max(self.train.lengths.max(), self.valid.lengths.max()))
        rows = max(1, min(BATCH_TOKENS // longest, len(self.train.lengths)))
        network = self._network(frozen=False)
        network.eval()
        graph = forward_graph(network, rows, longest, self.depth)
        held = self._replayed(graph, network)
        # While a batch is written to the disk, the next one is computed.
        return replace(held, cache=held.cache + 2 * graph.outputs[0].nbytes)

    def _first_look(self) -> Breakdown:
        network = self._network(frozen=False)
        network.eval()
        if self.depth and (self.prefixed.train or self.prefixed.valid):
            length = int(max(self.train.lengths[:LOOKED_AT].max(), self.valid.lengths[:LOOKED_AT].max()))
        else:
            length = int(self.valid.lengths.max())  # validation begins with the longest rows
        rows = min(LOOKED_AT, len(self.valid.lengths))
        length = RowSizes.alike(length, 1).largest_batch(1)[1]
        return self._replayed(first_look_graph(network, rows, length), network)

    def _validation(self) -> Breakdown:
        network = self._network(frozen=self._freed())
        network.eval()
        shape = self._shape(self.valid, self.prefixed.valid, network)
        held = self._replayed(validation_graph(network, shape), network)
        standing = optimizer_bytes(network, self.settings)
        return replace(self._with_standing(held, network), optimizer=standing)

    def _training(self) -> Breakdown:
        network = self._network(frozen=self._freed())
        network.train()
        shape = self._shape(self.train, self.prefixed.train, network)
        steps = self.settings.accumulation_steps
        if steps == 1:
            held = self._replayed(update_graph(network, self.settings, shape), network)
        else:
            gradient = self._replayed(gradient_graph(network, self.settings, shape), network)
            gradient = replace(gradient, optimizer=optimizer_bytes(network, self.settings))
            applied = self._replayed(apply_graph(network, self.settings), network)
            weights = sum(each.nbytes for each in _frozen(network).values())
            held = max(gradient, replace(applied, weights=weights), key=lambda each: each.bytes)
        batch = sum(array.nbytes for array in shape.arrays(embedded(network).shape[-1]).values())
        # The group's batches are all there, and those of the next one are made while it is computed.
        return self._with_standing(replace(held, cache=held.cache + (2 * steps - 1) * batch), network)

    def _network(self, frozen: bool) -> nn.Module:
        """With its adapter; `frozen`: the layers below it are replaced by what they gave."""
        network = with_adapter(skeleton(self.config), self.settings)
        if self.depth and (self.prefixed.train or self.prefixed.valid) and frozen:
            replace_prefix(network, self.depth, keep=self.prefixed.train != self.prefixed.valid)
        return network

    def _freed(self) -> bool:
        return self.prefixed.train or self.prefixed.valid

    def _shape(self, rows: RowSizes, prefixed: bool, network: nn.Module) -> BatchShape:
        dtype = embedded(network).dtype if prefixed else None
        return BatchShape(*rows.largest_batch(self.settings.batch_size), dtype)

    def _with_standing(self, held: Breakdown, network: nn.Module) -> Breakdown:
        """With what stays from step to step: the best adapter so far, and hidden states kept on a GPU."""
        best = sum(array.nbytes for array in adapter_weights(network).values())
        token_bytes = embedded(network).shape[-1] * embedded(network).dtype.size
        kept = [
            rows.tokens * token_bytes
            for rows, prefixed in ((self.train, self.prefixed.train), (self.valid, self.prefixed.valid))
            if prefixed
        ]
        on_gpu = sum(size for size in kept if size <= GPU_SHARE * own_memory_bytes())
        return replace(held, adapters=held.adapters + best, cache=held.cache + on_gpu)

    def _replayed(self, graph: Graph, network: nn.Module) -> Breakdown:
        prefixes = (f"{WEIGHT}.", f"{BATCH}.", f"{GRADIENT}.")
        kept = [name for name in graph.inputs if name.startswith(prefixes)]
        moment = highest(fused(graph), pace(), self._names(graph, network), kept)
        return Breakdown(**{part: moment.held.get(part, 0) for part in PARTS})

    def _names(self, graph: Graph, network: nn.Module) -> Callable[[Value], str]:
        """What each array of the graph is, by name of `Breakdown`."""
        named = {value: OF_INPUT[name.partition(".")[0]] for name, value in graph.inputs.items()}
        trained = {array.shape for array in adapter_weights(network).values()}

        def name_of(value: Value) -> str:
            if value in named:
                return named[value]
            if value.shape in trained:
                return "gradients"
            large = len(value.shape) > 1 and value.shape[-1] == self.vocabulary
            return "logits" if large else "activations"

        return name_of


def _vocabulary(config: Mapping[str, Any]) -> int:
    return int({**config, **config.get("text_config", {})}["vocab_size"])


def _frozen(network: nn.Module) -> dict[str, mx.array]:
    trained = adapter_weights(network)
    return {name: array for name, array in tree_flatten(network.parameters()) if name not in trained}
