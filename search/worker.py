"""The process in which trials are trained; started by `search/children.py`, not by a person.

It keeps the base model in memory from trial to trial. It reads orders from its parent and answers with
messages; when the parent is gone it saves what it is training and ends. A proposal that needs more memory
than there is takes this process with it, and not the search.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from tasks.config import EvaluateSettings, TrainSettings
from tasks.errors import InputError, StepError
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput
from tasks.train.memory.budget import Allowed
from tasks.train.memory_guard import OverBudget
from tasks.train.trial import Reached, WarmBase, train_trial
from tasks.train.trial_prefixes import record_for_trials

ALLOCATION = ("malloc", "allocat", "out of memory", "OutOfMemory")
"""In the messages of MLX's RuntimeError on GPUs when memory ends; on CPU the process dies of it."""


LOGGERS = ("tasks", "search")


@dataclass(frozen=True)
class Begin:
    """The first order: what all trials have in common.

    Attributes:
        evaluate: how finished trials answer validation prompts, where there are `scores` to give them.
    """

    model: ModelFolder
    data: StepOutput
    evaluate: EvaluateSettings
    scores: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prefixes:
    """Compute the frozen layers of trials with these numbers of layers."""

    settings: TrainSettings
    num_layers: tuple[int, ...]


@dataclass(frozen=True)
class Train:
    """Train to `until_step`, or to the end, in at most so much memory, of which a share is expected of it."""

    settings: TrainSettings
    until_step: int | None
    budget_bytes: int
    share_bytes: int


Order = Prefixes | Train


@dataclass(frozen=True)
class Point:
    """Figures of a step."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Told:
    """A message for the person."""

    name: str
    level: int
    text: str


@dataclass(frozen=True)
class Done:
    """An order is carried out; `reached` of a training, `scores` of one that is at its end."""

    reached: Reached | None
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """An order could not be carried out; this process goes on."""

    kind: str
    """`input`, `step`, `memory` or `other`."""
    reason: str


Message = Point | Told | Done | Failed


def main() -> None:
    """Carry out orders until the parent closes the connection, whose descriptor is the argument."""
    connection = Connection(int(sys.argv[1]))
    begin: Begin = connection.recv()
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, orders), daemon=True).start()
    worker = Worker(connection, begin)
    while True:
        worker.carry_out(orders.get())


class Worker:
    """What carries out orders, over one connection."""

    def __init__(self, connection: Connection, begin: Begin) -> None:
        self._connection, self._begin = connection, begin
        self._base: WarmBase | None = None
        self._teller = _Teller(self)
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self._teller)
            logging.getLogger(name).setLevel(logging.INFO)

    def close(self) -> None:
        """Say nothing more of what this process logs."""
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self._teller)

    def send(self, message: Message) -> None:
        """Nobody listens when the parent is gone: then the signal of `_listen` is on its way."""
        with suppress(OSError):
            self._connection.send(message)

    def carry_out(self, order: Order) -> None:
        """Answer an order with `Done` or `Failed`."""
        try:
            reached = self._do(order)
            self.send(Done(reached, self._scores(reached)))
        except (Exception, KeyboardInterrupt) as error:
            self.send(_failed(error))

    def _do(self, order: Order) -> Reached | None:
        if self._base is None:
            self._base = WarmBase(self._begin.model)
        if isinstance(order, Prefixes):
            network, model = self._base.network, self._begin.model
            record_for_trials(order.settings, model, self._begin.data, order.num_layers, network)
            return None
        allowed = Allowed(order.budget_bytes, share_bytes=order.share_bytes)
        return train_trial(
            order.settings, self._base, self._begin.data, self._report, order.until_step, allowed
        )

    def _scores(self, reached: Reached | None) -> Mapping[str, float]:
        """Of the answers of a finished trial to validation prompts."""
        begin = self._begin
        if not begin.scores or reached is None or reached.adapter is None:
            return {}
        from tasks.evaluate.measure import answer_scores

        self._base = None  # or it would be in memory twice
        found = answer_scores(begin.evaluate, begin.model, reached.adapter, begin.data, "valid")
        return {name: found[name] for name in begin.scores}

    def _report(self, step: int, metrics: Mapping[str, float]) -> None:
        self.send(Point(step, dict(metrics)))


class _Teller(logging.Handler):
    """Log lines for the parent, who has the screen."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(logging.INFO)
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        self._worker.send(Told(record.name, record.levelno, record.getMessage()))


def _failed(error: BaseException) -> Failed:
    reason = f"{error}" if isinstance(error, InputError | StepError) else f"{type(error).__name__}: {error}"
    kind = "input" if isinstance(error, InputError) else "step" if isinstance(error, StepError) else "other"
    if isinstance(error, MemoryError | OverBudget) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ALLOCATION)
    ):
        kind = "memory"
    return Failed(kind, reason.strip().split("\n")[0])


def _listen(connection: Connection, orders: queue.SimpleQueue[Order]) -> None:
    """Take orders; when the parent closes the connection or dies, stop as if asked to.

    A training that is under way saves a checkpoint first.
    """
    try:
        while True:
            orders.put(connection.recv())
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
