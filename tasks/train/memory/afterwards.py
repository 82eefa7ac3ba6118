"""The peaks of what comes after a training, before it starts: answers written by base and tuned model while
they are evaluated, and the adapter merged into its base.

Both are traced and replayed as a training is (`estimate`). They are none of its phases: nothing of the
training is in memory any more, and `train.budget` does not refuse them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.nn as nn

from tasks.config import EvaluateSettings, Settings, TrainSettings
from tasks.fuse.fidelity import PROOF_ROWS
from tasks.fuse.merge import unquantised
from tasks.models.device import on_gpu
from tasks.train.adapters import adapter_weights
from tasks.train.memory.backends import pace
from tasks.train.memory.budget import UNTRACEABLE
from tasks.train.memory.calibration import Calibration, calibration
from tasks.train.memory.estimate import LOOKED_AT, Breakdown, Phase, vocabulary_size
from tasks.train.memory.fusion import fused
from tasks.train.memory.graph import Graph, Value
from tasks.train.memory.row_sizes import RowSizes
from tasks.train.memory.skeleton import skeleton, with_adapter
from tasks.train.memory.traced_afterwards import (
    CACHE,
    cache_arrays,
    caches_after,
    loading_graph,
    merging_graph,
    reading_graph,
    writing_graph,
)
from tasks.train.memory.traced_step import BatchShape, first_look_graph, validation_graph
from tasks.train.soft_prompt import KIND as SOFT_PROMPT

log = logging.getLogger(__name__)

ANSWERING, FUSING = "answering", "fusing"

NOTHING = Breakdown()

GROWTH = 256
"""Tokens by which mlx-lm's caches (0.32.2) grow, all rows at once; then a layer's old and new are there."""


def estimate_afterwards(
    settings: Settings, config: Mapping[str, Any], rows: RowSizes, calibrated: Calibration | None = None
) -> dict[str, Breakdown]:
    """The highest moment of each kind of work that these settings ask for after the training, in order.

    What a model's code does not allow to be traced is left out, with a warning.

    Args:
        config: the base's `config.json`.
        rows: of the test; what is not supervised of a row is taken for its prompt.
        calibrated: this machine's when left out.
    """
    calibrated = calibrated or calibration()
    work: dict[str, Iterator[Phase]] = {}
    if settings.evaluate.samples:
        work[ANSWERING] = _answering(settings.train, settings.evaluate, config, rows)
    if settings.fuse.enabled and settings.train.method != SOFT_PROMPT:
        work[FUSING] = _fusing(settings.train, config, rows)
    found: dict[str, Breakdown] = {}
    for name, phases in work.items():
        try:
            parts = [calibrated.applied(each.replayed(pace())) for each in phases]
        except UNTRACEABLE as error:
            log.warning("the memory that %s takes cannot be predicted for this model: %s", name, error)
        else:
            found[name] = max(parts, key=lambda each: each.bytes)
    return found


def _answering(
    train: TrainSettings, evaluate: EvaluateSettings, config: Mapping[str, Any], sizes: RowSizes
) -> Iterator[Phase]:
    """As `answer_prompts` does it with the adapter; the base alone takes less. All answers are the longest.

    The graphs are not fused: mlx-lm compiles single functions of a layer only, and of the 135M model on a CPU
    this is 1% over what was measured.
    """
    in_front = train.prompt_tokens if train.method == SOFT_PROMPT else 0
    prompt = max(2, in_front + int((sizes.lengths - sizes.supervised).max()))
    rows, end = min(evaluate.batch_size, evaluate.samples), prompt + evaluate.max_tokens
    network, trained = _tuned(config, train)
    yield from _loading(config)
    # While the next prompts are read, answers that are done still hold their caches.
    kept = _cache_bytes(network, rows, end) if evaluate.samples > rows else 0
    graph = reading_graph(network, rows, prompt - 1)
    yield Phase(ANSWERING, graph, _names(graph, trained, config), Breakdown(cache=kept))
    steps = [(prompt - 1, True)]
    if (grown := (end - 1) // GROWTH * GROWTH) > prompt:
        steps.append((grown, False))
    for before, first in steps:
        graph = writing_graph(network, rows, before, first)
        likely = rows * vocabulary_size(config) * graph.outputs[1].itemsize  # of the tokens before
        yield Phase(ANSWERING, graph, _names(graph, trained, config), Breakdown(logits=likely))


def _fusing(train: TrainSettings, config: Mapping[str, Any], rows: RowSizes) -> Iterator[Phase]:
    """As `fuse_adapter` does it: the adapter's loss, the merging, and the loss of what was written.

    A quantised form of it is smaller throughout, and so is the base that it is compared with.
    """
    yield from _loading(config)
    yield from _proof(*_tuned(config, train), config, rows)
    network, trained = _tuned(config, train)
    graph = merging_graph(network)
    yield Phase(FUSING, graph, _names(graph, trained, config, made="weights"), NOTHING)
    if on_gpu() and (plain := unquantised(dict(config))) != config:
        yield from _proof(skeleton(plain), frozenset(), plain, rows)


def _proof(
    network: nn.Module, trained: frozenset[str], config: Mapping[str, Any], rows: RowSizes
) -> Iterator[Phase]:
    """The loss on the first test rows, in one batch, and two of them looked at before."""
    shape = BatchShape(*rows.largest_batch(PROOF_ROWS))
    graphs = [
        first_look_graph(network, min(LOOKED_AT, shape.rows), shape.length),
        validation_graph(network, shape),
    ]
    for graph in graphs:
        yield Phase(FUSING, fused(graph), _names(graph, trained, config), NOTHING)


def _loading(config: Mapping[str, Any]) -> Iterator[Phase]:
    """On a GPU weights stay as they are stored, and nothing is beside them."""
    if not on_gpu():
        graph = loading_graph(config)
        yield Phase("loading", graph, _names(graph, frozenset(), config, made="weights"), NOTHING)


def _tuned(config: Mapping[str, Any], train: TrainSettings) -> tuple[nn.Module, frozenset[str]]:
    """The network with its adapter in evaluation mode, all of it frozen, and the names of the adapter."""
    network = with_adapter(skeleton(config), train)
    trained = frozenset(adapter_weights(network))
    network.freeze()
    network.eval()
    return network, trained


def _cache_bytes(network: nn.Module, rows: int, tokens: int) -> int:
    return sum(array.nbytes for array in cache_arrays(caches_after(network, rows, tokens)))


def _names(
    graph: Graph, trained: frozenset[str], config: Mapping[str, Any], made: str = "cache"
) -> Callable[[Value], str]:
    """What each array of the graph is, by name of `Breakdown`.

    Args:
        made: what its outputs are.
    """
    vocabulary = vocabulary_size(config)
    of_prefix = {CACHE: "cache", "batch": "cache"}
    named = {value: made for value in graph.outputs if len(value.shape) > 1 or made == "weights"}
    for name, value in graph.inputs.items():
        prefix, _, path = name.partition(".")
        named[value] = of_prefix.get(prefix, "adapters" if path in trained else "weights")
    of_caches = {_size(value) for value, part in named.items() if part == "cache" and len(value.shape) > 2}

    def name_of(value: Value) -> str:
        if value in named:
            return named[value]
        if value.shape and _size(value) in of_caches:
            return "cache"
        large = value.shape and value.shape[-1] == vocabulary
        return "logits" if large else "activations"

    return name_of


def _size(value: Value) -> tuple[int, int]:
    """What an array of a cache is known by, also while it is copied: numbers, and how many a head has."""
    return value.size, value.shape[-1]
