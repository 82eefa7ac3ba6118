"""The peak memory of a run before it starts: from a model's config, the settings and the rows' sizes alone.

Each kind of work of a run, a phase, is traced through the product's own modules without weights
(`traced_step`), fused as `mx.compile` does (`fusion`) and replayed as MLX carries it out (`replay`). The
run's peak is that of
its largest phase.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.nn as nn

from tasks.config import TrainSettings
from tasks.models.device import on_gpu, own_memory_bytes
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput
from tasks.train.adapters import adapter_weights
from tasks.train.frozen_prefix import LEAST_PASSES, frozen_depth
from tasks.train.memory.backends import layers_in_sight, pace
from tasks.train.memory.calibration import Calibration, calibration
from tasks.train.memory.fusion import fused
from tasks.train.memory.graph import Graph, Value
from tasks.train.memory.replay import UNDER_WAY, Pace, highest
from tasks.train.memory.row_sizes import RowSizes
from tasks.train.memory.skeleton import leave_out, skeleton, with_adapter
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
    flat,
    forward_graph,
    gradient_graph,
    optimizer_bytes,
    update_graph,
    validation_graph,
)
from tasks.train.prefix_cache import BATCH_TOKENS, GPU_SHARE
from tasks.train.quantised_base import check_base
from tasks.train.soft_prompt import KIND as SOFT_PROMPT
from tasks.train.substitution import replace_prefix

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
        limit_bytes: what MLX has to be held to, or it would run ahead beyond the peak; None on a CPU.
        phase: the one whose peak is the run's.
    """

    phases: Mapping[str, Breakdown]
    limit_bytes: int | None = None

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
    """Which splits' frozen layers are computed once.

    Attributes:
        base_stays: frozen layers are in memory all the same, as a search keeps its base for the next trial.
    """

    train: bool
    valid: bool
    base_stays: bool = False


def estimate_memory(
    settings: TrainSettings, model: ModelFolder, data: StepOutput, base_stays: bool = False
) -> MemoryEstimate:
    """Predict the peak of training `settings` on prepared data: its largest batch decides.

    Args:
        base_stays: see `Prefixed`.

    Raises:
        InputError: the model does not allow the settings.
    """
    from tasks.train.memory.budget import plan_of

    return plan_of(settings, model, data, base_stays).estimate()


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
    calibrated = calibrated or calibration()
    with _nothing_collected():
        work = phases(settings, config, train, valid, prefixed)
        limit = limit_bytes(work)
        ahead = pace() if limit is None else replace(pace(), limit_bytes=limit)
        return MemoryEstimate({each.name: calibrated.applied(each.replayed(ahead)) for each in work}, limit)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Hold Python's collector off in the block: it would walk the growing graphs again and again, for 0.4 s
    of 1.4 s (30 layers), and find nothing to free."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def limit_bytes(work: Sequence[Phase]) -> int | None:
    """What MLX is held to: where it would be half a task ahead of a GPU, throughout.

    On its own it is up to ten ahead, as far as the GPU is behind, and takes up to 40% more memory (measured).
    A CPU is behind always, and how far is known.
    """
    if not on_gpu():
        return None
    none, one = (max(each.replayed(replace(pace(), tasks=tasks)).bytes for each in work) for tasks in (0, 1))
    return (none + one) // 2


def phases(
    settings: TrainSettings,
    config: Mapping[str, Any],
    train: RowSizes,
    valid: RowSizes | None = None,
    prefixed: Prefixed | None = None,
) -> list[Phase]:
    """What is done in a training, in order; arguments as in `estimate_from_config`."""
    check_base(settings.method, config)
    return _Run(settings, config, train, valid or train, prefixed or _usual(settings)).phases()


@dataclass(frozen=True)
class Phase:
    """One kind of work of a run, traced.

    Attributes:
        graph: fused.
        name_of: of its arrays, the name of a part.
        standing: what is held throughout beside the graph's own arrays.
    """

    name: str
    graph: Graph
    name_of: Callable[[Value], str]
    standing: Breakdown

    def replayed(self, ahead: Pace) -> Breakdown:
        """Its highest moment when MLX runs `ahead` so far."""
        prefixes = (f"{WEIGHT}.", f"{BATCH}.", f"{GRADIENT}.")
        kept = [name for name in self.graph.inputs if name.startswith(prefixes)]
        moment = highest(self.graph, ahead, self.name_of, kept, self.standing.bytes)
        held = Counter(moment.held) + Counter(self.standing.parts())
        held["activations"] += held.pop(UNDER_WAY, 0)
        return Breakdown(**{part: held[part] for part in PARTS})


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
        whole = with_adapter(skeleton(self.config), self.settings)
        self.depth = frozen_depth(settings, len(whole.layers))
        self.prefixed = prefixed if self.depth else Prefixed(False, False)
        vector = embedded(whole)
        self.width, self.dtype = vector.shape[-1], vector.dtype
        self.vocabulary = vocabulary_size(config)
        self.optimizer = optimizer_bytes(whole, settings)
        self.trained = sum(array.nbytes for array in adapter_weights(whole).values())
        self.left_out = _bytes(leave_out(whole, self.depth, layers_in_sight(pace())))
        self.networks = {False: (whole, whole.parameters())}

    def phases(self) -> list[Phase]:
        """All of them, in order."""
        found = []
        if self.prefixed.train or self.prefixed.valid:
            found.append(self._building())
        found += [self._first_look(), self._validation()]
        return found + (self._training() if self.settings.accumulation_steps == 1 else self._accumulating())

    def _building(self) -> Phase:
        longest = int(max(self.train.lengths.max(), self.valid.lengths.max()))
        rows = max(1, min(BATCH_TOKENS // longest, len(self.train.lengths)))
        network = self._network(freed=False)
        graph = forward_graph(network, rows, longest, self.depth)
        # While a batch is written to the disk, the next one is computed.
        return self._phase(
            "building the frozen prefix",
            graph,
            network,
            Breakdown(weights=self.left_out, cache=2 * graph.outputs[0].nbytes),
        )

    def _first_look(self) -> Phase:
        rows = min(LOOKED_AT, len(self.valid.lengths))
        if self.prefixed.train or self.prefixed.valid:
            longest = int(max(rows.lengths[:LOOKED_AT].max() for rows in (self.train, self.valid)))
        else:
            longest = int(self.valid.lengths.max())  # the first batch of validation
            rows = min(rows, self.settings.batch_size)
        length = RowSizes.alike(longest, 1).largest_batch(1)[1]
        network = self._network(freed=False)
        graph = first_look_graph(network, rows, length)
        return self._phase("first look", graph, network, Breakdown(weights=self.left_out))

    def _validation(self) -> Phase:
        network = self._network(freed=True)
        graph = validation_graph(network, self._shape(self.valid, self.prefixed.valid))
        standing = replace(self._standing(), optimizer=self.optimizer)
        return self._phase("validation", graph, network, standing)

    def _training(self) -> list[Phase]:
        network = self._network(freed=True)
        network.train()
        graph = update_graph(network, self.settings, self._shape(self.train, self.prefixed.train))
        return [self._phase("training", graph, network, self._with_batches(self._standing()), updates=True)]

    def _accumulating(self) -> list[Phase]:
        network = self._network(freed=True)
        network.train()
        standing = self._with_batches(self._standing())
        gradient = gradient_graph(network, self.settings, self._shape(self.train, self.prefixed.train))
        trained = adapter_weights(network)
        weights = sum(array.nbytes for name, array in flat(network.parameters()) if name not in trained)
        return [
            self._phase("training", gradient, network, replace(standing, optimizer=self.optimizer)),
            self._phase(
                "update",
                apply_graph(network, self.settings),
                network,
                replace(standing, weights=standing.weights + weights),
                updates=True,
            ),
        ]

    def _network(self, freed: bool) -> nn.Module:
        """With its adapter, in evaluation mode; `freed`: without the layers that the run frees.

        Built once, and given its own arrays again in place of those that the last trace left in it.
        """
        freed = freed and (self.prefixed.train or self.prefixed.valid)
        if freed not in self.networks:
            network = with_adapter(skeleton(self.config), self.settings)
            leave_out(network, self.depth, layers_in_sight(pace()))
            replace_prefix(network, self.depth, keep=not self._frees())
            self.networks[freed] = network, network.parameters()
        network, arrays = self.networks[freed]
        network.update(arrays)
        network.eval()
        return network

    def _shape(self, rows: RowSizes, prefixed: bool) -> BatchShape:
        return BatchShape(*rows.largest_batch(self.settings.batch_size), self.dtype if prefixed else None)

    def _standing(self) -> Breakdown:
        """What stays from step to step: the best adapter so far, and hidden states kept on a GPU."""
        settings = self.settings
        validated = settings.max_steps is None or settings.max_steps > settings.steps_per_eval
        split = ((self.train, self.prefixed.train), (self.valid, self.prefixed.valid))
        sizes = [rows.tokens * self.width * self.dtype.size for rows, prefixed in split if prefixed]
        on_device = sum(size for size in sizes if size <= GPU_SHARE * own_memory_bytes())
        return Breakdown(
            weights=0 if self._frees() else self.left_out,
            adapters=self.trained if validated else 0,
            cache=on_device,
        )

    def _frees(self) -> bool:
        """Whether the frozen layers are gone when training begins."""
        return self.prefixed.train and self.prefixed.valid and not self.prefixed.base_stays

    def _with_batches(self, standing: Breakdown) -> Breakdown:
        """The group's other batches, and those of the next one, which are made while it is computed."""
        batch = self._shape(self.train, self.prefixed.train).arrays(self.width)
        batches = 2 * self.settings.accumulation_steps - 1
        return replace(standing, cache=standing.cache + batches * sum(each.nbytes for each in batch.values()))

    def _phase(
        self, name: str, graph: Graph, network: nn.Module, standing: Breakdown, updates: bool = False
    ) -> Phase:
        return Phase(name, fused(graph), self._names(graph, network, updates), standing)

    def _names(self, graph: Graph, network: nn.Module, updates: bool) -> Callable[[Value], str]:
        """What each array of the graph is, by name of `Breakdown`."""
        named = {value: OF_INPUT[name.partition(".")[0]] for name, value in graph.inputs.items()}
        trained = {array.shape for array in adapter_weights(network).values()}
        if updates:  # its last outputs are the new weights, then the new state
            state = sum(part == "optimizer" for part in named.values())
            weights = len(adapter_weights(network))
            after = graph.outputs[-weights - state :]
            named |= {
                value: "adapters" if place < weights else "optimizer" for place, value in enumerate(after)
            }

        def name_of(value: Value) -> str:
            if value in named:
                return named[value]
            if value.shape in trained:
                return "gradients"
            large = len(value.shape) > 1 and value.shape[-1] == self.vocabulary
            return "logits" if large else "activations"

        return name_of


def _bytes(layers: Sequence[nn.Module]) -> int:
    return sum(array.nbytes for layer in layers for _, array in flat(layer.parameters()))


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """Tokens that logits are of."""
    return int({**config, **config.get("text_config", {})}["vocab_size"])
