"""The graphs of what follows a training, traced as those of the training are (`traced_step`): a base that is
loaded, an adapter that is merged into it, prompts that are read and answers that are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tasks.fuse.merge import merge_layers
from tasks.models.load import as_float32
from tasks.train.memory.graph import Graph, Operation, graph_of
from tasks.train.memory.skeleton import stored_network
from tasks.train.memory.traced_step import BATCH, TRAINED, WEIGHT, flat, take

CACHE = "cache"
"""What the names of inputs begin with that hold the keys and values of earlier tokens."""

READ_AT_ONCE = 2048
"""Tokens of a prompt: `prefill_step_size` of mlx-lm's BatchGenerator (0.32.2)."""


def loading_graph(config: Mapping[str, Any]) -> Graph:
    """Weights read as they are stored and made float32, as `load_model` does on a CPU."""
    network = stored_network(config)

    def load(**arrays: mx.array) -> list[mx.array]:
        take(network, arrays)
        return _parameters(as_float32(network, dict(config))[0])

    traced = graph_of(load, _weights(network, WEIGHT))
    reads = [Operation("Load", [], [], [value]) for value in traced.inputs.values()]
    return replace(traced, inputs={}, operations=[*reads, *traced.operations])


def merging_graph(network: nn.Module) -> Graph:
    """`merge_layers`, evaluated all at once as `save_safetensors` does. The network is not to be used again.

    The inputs' names begin with `TRAINED`: a weight is free as soon as it is merged.
    """

    def merge(**arrays: mx.array) -> list[mx.array]:
        take(network, arrays)
        merge_layers(network)
        return _parameters(network)

    return graph_of(merge, _weights(network, TRAINED))


def reading_graph(network: nn.Module, rows: int, length: int) -> Graph:
    """Prompts of `length` tokens read into caches, the last part of long ones; no logits are made."""
    before = (length - 1) // READ_AT_ONCE * READ_AT_ONCE
    caches = caches_after(network, rows, before)

    def read(**arrays: mx.array) -> list[mx.array]:
        take(network, arrays)
        _take_caches(caches, arrays)
        network(arrays[f"{BATCH}.inputs"], cache=caches)
        return cache_arrays(caches)

    ids = mx.zeros((rows, length - before), mx.int32)
    return graph_of(read, {**_weights(network, WEIGHT), f"{BATCH}.inputs": ids, **_named(caches)})


def writing_graph(network: nn.Module, rows: int, before: int, first: bool) -> Graph:
    """A token of each answer, behind `before` others, as mlx-lm's GenerationBatch (0.32.2) has it.

    Args:
        first: of the answers, for which the caches are copied.
    """
    caches = caches_after(network, rows, before)

    def write(**arrays: mx.array) -> list[mx.array]:
        take(network, arrays)
        _take_caches(caches, arrays)
        if first:
            for cache in caches:
                cache.filter(list(range(rows)))
        logits = network(arrays[f"{BATCH}.inputs"], cache=caches)[:, -1, :]  # (rows, vocabulary)
        likely = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return [mx.argmax(likely, axis=-1), *list(likely), *cache_arrays(caches)]

    ids = mx.zeros((rows, 1), mx.int32)
    return graph_of(write, {**_weights(network, WEIGHT), f"{BATCH}.inputs": ids, **_named(caches)})


def caches_after(network: nn.Module, rows: int, tokens: int) -> list[Any]:
    """mlx-lm's caches of a batch with so many tokens in each row, never evaluated."""
    from mlx_lm.models.cache import make_prompt_cache

    alone = [make_prompt_cache(network) for _ in range(rows)]
    caches = [layer[0].merge(list(layer)) for layer in zip(*alone, strict=True)]
    for start in range(0, tokens, READ_AT_ONCE):
        network(mx.zeros((rows, min(READ_AT_ONCE, tokens - start)), mx.int32), cache=caches)
    return caches


def cache_arrays(caches: list[Any]) -> list[mx.array]:
    """All arrays that caches hold."""
    return [leaf for cache in caches for _, leaf in flat(cache.state) if isinstance(leaf, mx.array)]


def _named(caches: list[Any]) -> dict[str, mx.array]:
    """Those of more than one number a row: the others, of the rows' positions, are known in a trace too."""
    return {
        f"{CACHE}.{place}.{name}": leaf
        for place, cache in enumerate(caches)
        for name, leaf in flat(cache.state)
        if isinstance(leaf, mx.array) and leaf.ndim > 1
    }


def _take_caches(caches: list[Any], arrays: Mapping[str, mx.array]) -> None:
    for place, cache in enumerate(caches):
        state: Any = [arrays.get(f"{CACHE}.{place}.{name}", leaf) for name, leaf in flat(cache.state)]
        if any(name.startswith(f"{CACHE}.{place}.") for name in arrays):
            cache.state = state


def _weights(network: nn.Module, prefix: str) -> dict[str, mx.array]:
    return {f"{prefix}.{name}": array for name, array in flat(network.parameters())}


def _parameters(network: nn.Module) -> list[mx.array]:
    return [array for _, array in flat(network.parameters())]
