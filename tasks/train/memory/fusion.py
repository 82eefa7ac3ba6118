"""Which element-wise operations `mx.compile` makes one of: what is between them never takes memory.

The rules are those of MLX 0.32.4 (`compile_fuse` in mlx/compile.cpp): from each operation, last first, all
that lead to it are taken in that are element-wise, to a depth of 11, as long as nothing outside needs them
and fewer than 24 arrays go in.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from tasks.train.memory.graph import Graph, Operation, Value

MOST_DEEP, MOST_INPUTS = 11, 24

ELEMENTWISE = frozenset(
    [
        "Abs",
        "Add",
        "ArcCos",
        "ArcCosh",
        "ArcSin",
        "ArcSinh",
        "ArcTan",
        "ArcTan2",
        "ArcTanh",
        "AsType",
        "BitwiseBinary",
        "BitwiseInvert",
        "Ceil",
        "Cos",
        "Cosh",
        "Divide",
        "Equal",
        "Erf",
        "ErfInv",
        "Exp",
        "Expm1",
        "Floor",
        "Greater",
        "GreaterEqual",
        "Less",
        "LessEqual",
        "Log",
        "Log1p",
        "Log2",
        "Log10",
        "LogAddExp",
        "LogicalAnd",
        "LogicalNot",
        "LogicalOr",
        "Maximum",
        "Minimum",
        "Multiply",
        "Negative",
        "NotEqual",
        "Power",
        "Remainder",
        "Round",
        "Rsqrt",
        "Select",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Sqrt",
        "Square",
        "Subtract",
        "Tan",
        "Tanh",
    ]
)


def fused(graph: Graph) -> Graph:
    """The graph as `mx.compile` leaves it."""
    fusion = _Fusion(graph)
    taken: set[Operation] = set()
    kept: list[Operation] = []
    for operation in reversed(graph.operations):
        if operation in taken:
            continue
        group = fusion.around(operation) if operation.name in ELEMENTWISE else {operation}
        taken |= group
        kept.append(_as_one(operation, group, graph) if len(group) > 1 else operation)
        if len(group) > 1:
            fusion.replace(group, kept[-1])
    return replace(graph, operations=kept[::-1])


class _Fusion:
    """What depends on what, kept up to date while operations become one."""

    def __init__(self, graph: Graph) -> None:
        self.ends = set(graph.outputs)
        self.maker = {value: each for each in graph.operations for value in each.outputs}
        self.users: dict[Value, set[Operation]] = defaultdict(set)
        for each in graph.operations:
            for value in each.inputs:
                self.users[value].add(each)

    def around(self, last: Operation) -> set[Operation]:
        """The operations that become one with `last`, itself among them."""
        group: set[Operation] = set()
        inputs: set[Value] = set()

        def take(value: Value, depth: int) -> None:
            made = self.maker.get(value)
            if made in group:
                return
            broadcast = made is not None and made.name == "Broadcast"
            fits = made is not None and (broadcast or made.name in ELEMENTWISE)
            other_end = value in self.ends and value.shape != last.outputs[0].shape
            if made is None or depth >= MOST_DEEP or not fits or other_end:
                inputs.add(value)
                return
            if depth and not self.users[value] <= group:
                inputs.add(value)  # a broadcast is a view: that it stays outside costs nothing
                return
            if value in self.ends:
                inputs.add(value)
            else:
                inputs.discard(value)
            if len(inputs) >= MOST_INPUTS:
                return
            group.add(made)
            for each in made.inputs:
                take(each, depth + 1)

        take(last.outputs[0], 0)
        return group

    def replace(self, group: set[Operation], one: Operation) -> None:
        """Let `one` stand where those of `group` were."""
        for each in group:
            for value in each.inputs:
                self.users[value].discard(each)
        for value in one.inputs:
            self.users[value].add(one)
        for value in one.outputs:
            self.maker[value] = one


def _as_one(last: Operation, group: set[Operation], graph: Graph) -> Operation:
    made = {value for each in group for value in each.outputs}
    inputs: list[Value] = []
    visited: set[Operation] = set()
    maker = {value: each for each in group for value in each.outputs}

    def collect(operation: Operation) -> None:
        if operation in visited:
            return
        visited.add(operation)
        for value in operation.inputs:
            if value in made:
                collect(maker[value])
            elif value not in inputs:
                inputs.append(value)

    collect(last)
    ends = [value for value in graph.outputs if value in made and value is not last.outputs[0]]
    return Operation("Compiled", [], inputs, [*dict.fromkeys(ends), last.outputs[0]])
