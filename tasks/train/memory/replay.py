"""What MLX would hold in memory at each moment of carrying a graph out: its order, its views, its reuse.

Rules of MLX 0.32.4, by file of its source:

- The order (mlx/transforms.cpp, `eval_impl`): breadth first from the outputs, at most 20 wide, then reversed.
- A view takes no memory and keeps what it looks at (mlx/backend/common/common.cpp); a reshape is one where
  strides allow it.
- An element-wise operation writes into an input that nobody else holds (`is_donatable` in mlx/array.h).
- A matrix product copies an operand whose last two axes are neither rows nor columns
  (mlx/backend/cpu/matmul.cpp).
- What an operation reads is held until it is done, and MLX runs ahead of the machine: memory is taken when an
  operation is handed over, given back when it is done. `Pace` says how far ahead.
- Beyond a limit (`mx.set_memory_limit`) MLX waits, after the operation that went beyond it.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.train.memory.fusion import ELEMENTWISE
from tasks.train.memory.graph import Graph, Operation, Value

UNDER_WAY = "under way"
"""What is held around the limit beyond what is known, as `name_of` calls other things."""

BEYOND = 0.01
"""Of a limit, by which MLX goes beyond it at least (measured)."""

WIDTH = 20
"""MLX_BFS_MAX_WIDTH."""

VIEWS = frozenset(
    [
        "AsStrided",
        "Broadcast",
        "BroadcastAxes",
        "Copy",
        "Depends",
        "ExpandDims",
        "Flatten",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "StopGradient",
        "Transpose",
        "Unflatten",
        "View",
    ]
)

RESHAPES = frozenset(["Flatten", "Reshape", "Unflatten"])

REUSING = ELEMENTWISE | {"Compiled", "Softmax", "SliceUpdate", "Scatter", "RMSNorm", "LayerNorm", "RoPE"}
"""Operations that write into an input of the output's size when they may."""

Ghost = NDArray[np.uint8]
"""An array's shape and strides, a byte a number, over no memory of that size."""


@dataclass(frozen=True)
class Pace:
    """How far MLX runs ahead of the machine, and what it rounds sizes up to.

    Attributes:
        tasks: under way at most.
        dispatches: a task is full with so many.
        numbers: or with operations that read so many numbers; None where that does not count.
        of_operation, of_view: dispatches that one takes.
        page_bytes: larger arrays take a multiple of it.
        limit_bytes: beyond so much MLX waits for what is under way.
        crest: of the times that the memory goes beyond the limit, the highest that is expected to be met. How
            far ahead MLX is at a moment is chance: what comes up once seldom meets it at the limit. Of 53
            runs on an H200 the third is within 3% of what was measured, the first up to 21% above it.
    """

    tasks: int
    dispatches: int
    numbers: int | None
    of_operation: int
    of_view: int
    page_bytes: int
    limit_bytes: float = math.inf
    crest: int = 3


@dataclass(frozen=True)
class Moment:
    """What is held at a peak.

    Attributes:
        held: bytes by what they are, as `name_of` calls them.
        operation: under way then.
    """

    held: Mapping[str, int]
    operation: str

    @property
    def bytes(self) -> int:
        """The sum."""
        return sum(self.held.values())


@dataclass(eq=False, slots=True)
class _Buffer:
    nbytes: int
    name: str
    holders: int = 0


@dataclass(eq=False, slots=True)
class _Array:
    """An array that is there: `users` are operations still to come that read it, plus whoever keeps it."""

    buffer: _Buffer
    ghost: Ghost
    users: int


def highest(
    graph: Graph,
    pace: Pace,
    name_of: Callable[[Value], str],
    kept: Collection[str],
    beside: int = 0,
) -> Moment:
    """The moment of the highest memory that is expected to be met while `graph` is carried out.

    Args:
        name_of: of an array, what it is.
        kept: names of inputs that somebody holds throughout; the others are free after their last use.
        beside: bytes that are held throughout and are no arrays of the graph.
    """
    return _Replay(graph, pace, name_of, kept, beside).run()


class _Replay:
    def __init__(
        self,
        graph: Graph,
        pace: Pace,
        name_of: Callable[[Value], str],
        kept: Collection[str],
        beside: int,
    ) -> None:
        self.graph, self.pace, self.name_of = graph, pace, name_of
        self.limit = pace.limit_bytes - beside
        self.held: Counter[str] = Counter()
        self.total = 0
        self.seen, self.highest = 0, -1
        self.peak = Moment({}, "")
        self.climbed: Moment | None = None
        self.crests: list[Moment] = []
        self.arrays: dict[Value, _Array] = {}
        self.under_way: deque[tuple[int, list[_Buffer]]] = deque()  # (task, what its operation reads)
        self.running: deque[int] = deque()
        self.task, self.dispatched, self.numbers = 0, 0, 0
        self.users = Counter(value for each in graph.operations for value in each.inputs)
        self.users.update(graph.outputs)
        named = {value: name for name, value in graph.inputs.items()}
        for value in [*graph.inputs.values(), *graph.constants]:
            if self.users[value] or named.get(value) in kept:
                array = self._new(value, _ghost(value.shape), math.prod(value.shape) * value.itemsize)
                array.users += named.get(value) in kept

    def run(self) -> Moment:
        self._look("start")
        for operation in ordered(self.graph):
            self._carry_out(operation)
        if self.peak.bytes <= self.limit:
            return self.peak
        self.total = 0
        self._look("end")
        met = sorted(self.crests, key=lambda crest: -crest.bytes)[: self.pace.crest][-1]
        missing = math.ceil(self.limit + BEYOND * self.pace.limit_bytes - met.bytes)
        return Moment({**met.held, UNDER_WAY: missing}, met.operation) if missing > 0 else met

    def _carry_out(self, operation: Operation) -> None:
        sources = [self.arrays[value] for value in operation.inputs]
        temporary = [self._buffer(size, "activations") for size in _copied(operation, sources)]
        for value, ghost, place in _laid_out(operation, [each.ghost for each in sources]):
            if place is not None:
                self._share(value, ghost, sources[place].buffer)
            elif (donor := self._donor(operation, sources, value)) is not None:
                self._share(value, ghost, donor.buffer)
            else:
                self._new(value, ghost, value.nbytes)
        self._look(operation.name)
        written = {id(self.arrays[value].buffer) for value in operation.outputs if value in self.arrays}
        reads = [*temporary]
        for each in sources:
            if id(each.buffer) not in written:
                each.buffer.holders += 1
                reads.append(each.buffer)
        for value in operation.inputs:
            self._used(value)
        for value in operation.outputs:  # one that nobody reads
            if not self.users[value] and value in self.arrays:
                self.arrays[value].users += 1
                self._used(value)
        self._hand_over(operation, reads)

    def _hand_over(self, operation: Operation, reads: list[_Buffer]) -> None:
        """Count the operation to the task under way; wait where there are too many tasks."""
        pace = self.pace
        self.under_way.append((self.task, reads))
        self.dispatched += pace.of_view if operation.name in VIEWS else pace.of_operation
        if operation.name not in VIEWS:
            self.numbers += sum(value.size for value in operation.inputs)
        full = self.dispatched >= pace.dispatches or (pace.numbers and self.numbers > pace.numbers)
        if full or self.total > self.limit:
            self.running.append(self.task)
            self.task, self.dispatched, self.numbers = self.task + 1, 0, 0
        while len(self.running) > pace.tasks or (self.running and self.total > self.limit):
            self._done(self.running.popleft())

    def _done(self, task: int) -> None:
        while self.under_way and self.under_way[0][0] <= task:
            for buffer in self.under_way.popleft()[1]:
                self._let_go(buffer)

    def _donor(self, operation: Operation, sources: Sequence[_Array], value: Value) -> _Array | None:
        if operation.name not in REUSING or len(operation.outputs) > 1:  # several outputs all hold the inputs
            return None
        size = math.prod(value.shape)
        for place, each in enumerate(sources):
            mine = each.users == 1 and each.buffer.holders == 1
            alike = operation.inputs[place].itemsize == value.itemsize and each.ghost.size == size
            if mine and alike and _dense(each.ghost):
                return each
        return None

    def _new(self, value: Value, ghost: Ghost, nbytes: int) -> _Array:
        return self._share(value, ghost, self._buffer(nbytes, self.name_of(value), holders=0))

    def _share(self, value: Value, ghost: Ghost, buffer: _Buffer) -> _Array:
        buffer.holders += 1
        self.arrays[value] = _Array(buffer, ghost, self.users[value])
        return self.arrays[value]

    def _used(self, value: Value) -> None:
        array = self.arrays[value]
        array.users -= 1
        if not array.users:
            del self.arrays[value]
            self._let_go(array.buffer)

    def _buffer(self, nbytes: int, name: str, holders: int = 1) -> _Buffer:
        pages = self.pace.page_bytes
        nbytes = math.ceil(nbytes / pages) * pages if nbytes > pages else nbytes
        self.held[name] += nbytes
        self.total += nbytes
        return _Buffer(nbytes, name, holders)

    def _let_go(self, buffer: _Buffer) -> None:
        buffer.holders -= 1
        if not buffer.holders:
            self.held[buffer.name] -= buffer.nbytes
            self.total -= buffer.nbytes

    def _look(self, operation: str) -> None:
        highest = self.total > self.highest
        if self.total > self.seen and (highest or self.limit < math.inf):
            self.climbed = Moment({name: count for name, count in self.held.items() if count}, operation)
            if highest:
                self.highest, self.peak = self.total, self.climbed
        elif self.climbed and self.total <= self.seen:
            self.crests.append(self.climbed)
            self.climbed = None
        self.seen = self.total


def ordered(graph: Graph) -> list[Operation]:
    """The operations in the order in which MLX carries them out."""
    maker = {value: each for each in graph.operations for value in each.outputs}
    whole = Operation("Synchronize", [], list(graph.outputs), [])
    needs = {
        each: [maker[value] for value in each.inputs if value in maker] for each in [*graph.operations, whole]
    }
    degree = Counter(made for each in needs.values() for made in each)
    tape: list[Operation] = [whole]
    waiting: list[tuple[Operation, int]] = []
    at = 0
    while degree and (at < len(tape) or waiting):
        if at < len(tape):
            operation, start = tape[at], 0
            at += 1
        else:
            operation, start = waiting.pop()
        inputs = needs[operation]
        for place in range(start, len(inputs)):
            if len(tape) - at >= WIDTH:
                waiting.append((operation, place))
                break
            made = inputs[place]
            degree[made] -= 1
            if not degree[made]:
                del degree[made]
                tape.append(made)
    return tape[:0:-1]


def _laid_out(operation: Operation, ghosts: Sequence[Ghost]) -> list[tuple[Value, Ghost, int | None]]:
    """Each output, its strides, and the place of the input that it is a view of, if it is one."""
    outputs = operation.outputs
    if operation.name == "Split":
        indices, axis = operation.arguments[:2]
        parts = np.split(ghosts[0], list(indices), axis)
        return [(value, part, 0) for value, part in zip(outputs, parts, strict=True)]
    if operation.name == "Depends":
        return [(value, ghosts[place], place) for place, value in enumerate(outputs)]
    if operation.name in VIEWS:
        seen = _seen(operation, ghosts[0])
        if seen is not None:
            return [(outputs[0], seen, 0)]
    strided = _same_strides(operation, ghosts)
    return [(value, _ghost(value.shape) if strided is None else strided, None) for value in outputs]


def _seen(operation: Operation, ghost: Ghost) -> Ghost | None:
    """A view's strides; None where a reshape has to copy."""
    [output], arguments = operation.outputs, operation.arguments
    match operation.name:
        case "Transpose":
            return ghost.transpose(arguments[0])
        case "Broadcast" | "BroadcastAxes":
            return np.broadcast_to(ghost, output.shape)
        case "Slice":
            starts, stops, steps = arguments[:3]
            return ghost[tuple(slice(*each) for each in zip(starts, stops, steps, strict=True))]
        case "Copy" | "StopGradient":
            return ghost
        case "Flatten" | "Reshape" | "Unflatten" | "ExpandDims" | "Squeeze":
            try:
                return ghost.reshape(output.shape, copy=False)
            except ValueError:
                return None
        case _:
            return _ghost(output.shape)


def _same_strides(operation: Operation, ghosts: Sequence[Ghost]) -> Ghost | None:
    """What an element-wise operation leaves where all inputs of its size are laid out alike."""
    if operation.name not in ELEMENTWISE and operation.name != "Compiled":
        return None
    shape = operation.outputs[0].shape
    large = [each for each in ghosts if each.size > 1]
    alike = large and all(each.shape == shape and each.strides == large[0].strides for each in large)
    return large[0] if alike and _dense(large[0]) else None


def _copied(operation: Operation, sources: Sequence[_Array]) -> list[int]:
    """Bytes of the copies that a matrix product makes of its operands."""
    if operation.name not in ("Matmul", "AddMM"):
        return []
    return [
        value.nbytes
        for value, source in zip(operation.inputs[:2], sources, strict=False)
        if not _rows_or_columns(source.ghost)
    ]


def _rows_or_columns(ghost: Ghost) -> bool:
    rows, columns = ghost.shape[-2:]
    down, across = ghost.strides[-2:]
    return (down == columns and across == 1) or (down == 1 and across == rows)


def _dense(ghost: Ghost) -> bool:
    """Whether every byte from its first to its last belongs to it, once."""
    expected = 1
    for stride, length in sorted(zip(ghost.strides, ghost.shape, strict=True)):
        if length == 1:
            continue
        if stride != expected:
            return False
        expected *= length
    return True


def _ghost(shape: tuple[int, ...]) -> Ghost:
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return np.lib.stride_tricks.as_strided(np.empty(1, np.uint8), shape, strides[::-1], writeable=False)
