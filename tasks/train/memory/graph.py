"""A computation as MLX would carry it out, without carrying it out: its operations, shapes and sizes.

`mx.export_function` traces a Python function over arrays that are never evaluated and hands out the graph
that it found, an operation at a time. Nothing is computed and no memory is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

MARK = 1_000_003.0
"""The number by which `instead_of` is found again in a graph: no model compares 0.0 with it."""


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """One array of a graph, unlike any other by its identity."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def size(self) -> int:
        """Numbers in it."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of it, laid out without gaps."""
        return self.size * self.itemsize


@dataclass(eq=False, slots=True)
class Operation:
    """One primitive of MLX.

    Attributes:
        name: MLX's, as "Matmul"; "Compiled" for several that are fused.
        arguments: MLX's, as the axes of a "Transpose".
    """

    name: str
    arguments: list[Any]
    inputs: list[Value]
    outputs: list[Value]


@dataclass(frozen=True)
class Graph:
    """Operations in an order in which they can be carried out.

    Attributes:
        inputs: by the names that they were given.
        constants: of these the value of those that are one number is known.
    """

    inputs: Mapping[str, Value]
    constants: Mapping[Value, float | None]
    operations: Sequence[Operation]
    outputs: Sequence[Value]


def graph_of(function: Callable[..., Sequence[mx.array]], arrays: Mapping[str, mx.array]) -> Graph:
    """What `function`, called with `arrays` by their names, would have MLX do.

    Args:
        arrays: lazy; of them only shape and type count.

    Raises:
        ValueError: MLX cannot export an operation that the function uses.
    """
    told: list[dict[str, Any]] = []
    names = list(arrays)
    # As one tuple: a call from C++ takes at most 1,024 arguments by name.
    mx.export_function(
        told.append, lambda *given: function(**dict(zip(names, given, strict=True))), tuple(arrays.values())
    )
    values: dict[str, Value] = {}

    def value(named: tuple[str, tuple[int, ...], mx.Dtype]) -> Value:
        name, shape, dtype = named
        if name not in values:
            values[name] = Value(tuple(shape), dtype.size)
        return values[name]

    by_type = {each["type"]: each for each in told if each["type"] != "primitive"}
    inputs = [value(each) for each in by_type["inputs"]["inputs"]]
    constants: dict[Value, float | None] = {}
    for name, array in by_type["constants"]["constants"]:
        constants[value((name, array.shape, array.dtype))] = float(array.item()) if array.size == 1 else None
    operations = [
        Operation(
            each["name"],
            each["arguments"],
            [value(one) for one in each["inputs"]],
            [value(one) for one in each["outputs"]],
        )
        for each in told
        if each["type"] == "primitive"
    ]
    outputs = [value(each) for each in by_type["outputs"]["outputs"]]
    return _needed(dict(zip(names, inputs, strict=True)), constants, operations, outputs)


def instead_of(value: mx.array, followed: mx.array, given: Sequence[mx.array] = ()) -> mx.array:
    """For traces only: `value`, with the gradient of `followed`, which has its shape.

    What MLX knows as a custom function cannot be exported; this says the same in operations that can.
    Forward only the operations of `value` stay in the graph, backward only those of `followed`.

    Args:
        given: the arguments of the custom function, which MLX holds until its value is there.
    """
    never = mx.array(0.0) > mx.array(MARK)
    if given:
        [value] = mx.depends([value], list(given))
    return mx.where(never, followed, mx.stop_gradient(value))


def recomputed(function: Callable[..., mx.array], *arrays: mx.array) -> mx.array:
    """For traces only: what `mx.checkpoint(function)(*arrays)` does, as its source has it (0.32.4)."""
    value = mx.stop_gradient(function(*arrays))
    return instead_of(value, function(*mx.depends(list(arrays), [value])), arrays)


def _needed(
    inputs: Mapping[str, Value],
    constants: Mapping[Value, float | None],
    operations: Sequence[Operation],
    outputs: Sequence[Value],
) -> Graph:
    """The graph with `instead_of` resolved, and without what nothing depends on."""
    maker = {output: each for each in operations for output in each.outputs}
    stands_for: dict[Value, Value] = {}

    def resolved(value: Value) -> Value:
        while value in stands_for:
            value = stands_for[value]
        return value

    for each in operations:
        each.inputs = [resolved(value) for value in each.inputs]
        marked = [_is_mark(value, maker, constants) for value in each.inputs]
        if each.name == "Select" and marked[0]:
            stands_for[each.outputs[0]] = each.inputs[2]
        elif each.name == "StopGradient":  # nearly all are those of `instead_of`
            stands_for[each.outputs[0]] = each.inputs[0]
        elif each.name == "Multiply" and any(marked):  # of `followed`: (never as a number) x its gradient
            stands_for[each.outputs[0]] = each.inputs[marked.index(False)]
    ends = [resolved(value) for value in outputs]
    return Graph(inputs, constants, _in_order(operations, ends, maker), ends)


def _in_order(
    operations: Sequence[Operation], ends: Sequence[Value], maker: Mapping[Value, Operation]
) -> list[Operation]:
    """The operations that `ends` need, each after those it needs itself."""
    ordered: dict[Operation, None] = {}
    stack = [(maker[value], False) for value in reversed(ends) if value in maker]
    while stack:
        operation, ready = stack.pop()
        if operation in ordered:
            continue
        if ready:
            ordered[operation] = None
            continue
        stack.append((operation, True))
        stack += [(maker[value], False) for value in reversed(operation.inputs) if value in maker]
    return list(ordered)


def _is_mark(value: Value, maker: Mapping[Value, Operation], constants: Mapping[Value, float | None]) -> bool:
    while value in maker and maker[value].name in ("Broadcast", "Reshape", "ExpandDims", "AsType"):
        value = maker[value].inputs[0]
    made = maker.get(value)
    return made is not None and made.name == "Greater" and constants.get(made.inputs[1]) == MARK
