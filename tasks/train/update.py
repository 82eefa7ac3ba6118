"""One update of the weights: the gradient of a group of batches, and the optimizer's step.

Both are compiled once for each shape of batch. The machine is left to compute while the next batches are
made: the figures of an update are read when they are asked for.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from tasks.config import TrainSettings
from tasks.errors import StepError
from tasks.train.adapters import adapter_weights
from tasks.train.batches import Batch
from tasks.train.loss import summed_loss
from tasks.train.optimizers import set_learning_rate
from tasks.train.schedules import learning_rate_at
from tasks.train.supervised import gathers

UPDATES_TIMED = 10
"""So many of the latest give the speed."""


class Updates:
    """The updates of one training.

    Args:
        model: in training mode while updates are launched.
        optimizer: new, or with the state to go on from.
        steps: updates of the whole training, which the learning rate follows.
    """

    def __init__(
        self, model: nn.Module, optimizer: optim.Optimizer, settings: TrainSettings, steps: int
    ) -> None:
        self._model, self._optimizer, self._settings, self._steps = model, optimizer, settings, steps
        optimizer.init(model.trainable_parameters())  # keeps what is there
        self._clock = _Clock()
        self._gradient, self._apply = self._compute_gradient, self._apply_gradient
        if not (settings.dropout and settings.grad_checkpoint):  # which has to look at the random state
            self._gradient = mx.compile(
                self._compute_gradient,
                inputs=[model.state, mx.random.state],
                outputs=[mx.random.state],
            )
            state = [model.state, optimizer.state]
            self._apply = mx.compile(self._apply_gradient, inputs=state, outputs=state)

    def launch(self, batches: Sequence[Batch], step: int) -> Launched:
        """Begin update number `step`, from 1, over a group of batches.

        Several batches give the gradient of the mean loss over all their supervised tokens, one batch in
        memory at a time: each counts by its share of the tokens, so that this equals the gradient of one
        big batch to float rounding.
        """
        self._clock.start()
        set_learning_rate(self._optimizer, rate := learning_rate_at(step, self._steps, self._settings))
        losses, gradient = self.gradient(batches, step)
        norm, finite = self._apply(gradient)
        mx.async_eval(losses, norm, finite, self._model.trainable_parameters(), self._optimizer.state)
        return Launched(step, batches, rate, losses, norm, finite, self._clock, self._settings)

    def gradient(self, batches: Sequence[Batch], step: int) -> tuple[list[mx.array], Any]:
        """What each batch adds to the group's mean loss, and the gradient as a tree."""
        tokens = sum(batch.supervised_tokens for batch in batches)
        losses: list[mx.array] = []
        gradient: Any = None
        for place, batch in enumerate(batches):
            gathers(self._model, batch.inputs)  # found out now: nothing can be compared while compiling
            if self._settings.dropout:
                mx.random.seed(dropout_seed(self._settings.seed, step, place))
            loss, part = self._gradient(mx.array(1 / tokens), *batch.arrays())
            losses.append(loss)
            gradient = part if gradient is None else tree_map(mx.add, gradient, part)
            if len(batches) > 1:
                mx.eval(loss, gradient)
        return losses, gradient

    def _compute_gradient(self, scale: mx.array, *arrays: mx.array) -> tuple[mx.array, Any]:
        def loss(*arrays: mx.array) -> mx.array:
            return scale * summed_loss(self._model, *arrays)

        own = self._model.trainable_parameters()
        value, gradient = nn.value_and_grad(self._model, loss)(*arrays)
        self._model.update(own)  # what was differentiated, else the arrays of its graph, stay in the model
        return value, gradient

    def _apply_gradient(self, gradient: Any) -> tuple[mx.array, mx.array]:
        """The gradient's norm before clipping, and whether all weights are finite after the update."""
        gradient, norm = optim.clip_grad_norm(gradient, self._settings.max_grad_norm or math.inf)
        self._optimizer.update(self._model, gradient)
        finite = [mx.isfinite(array).all() for array in adapter_weights(self._model).values()]
        return norm, mx.stack(finite).all()


class _Clock:
    """Speed over the latest updates: one may be found done in no time, its work behind the one before."""

    def __init__(self) -> None:
        self._under_way = 0
        self._marks: deque[tuple[float, int]] = deque(maxlen=UPDATES_TIMED + 1)

    def start(self) -> None:
        """An update is launched; where none was under way, time counts from now."""
        if not self._under_way:
            self._marks.clear()
            self._marks.append((time.perf_counter(), 0))
        self._under_way += 1

    def stop(self, tokens: int) -> tuple[float, float]:
        """An update is done: tokens and updates a second over the latest ones."""
        self._under_way -= 1
        self._marks.append((time.perf_counter(), tokens))
        (began, _), *done = self._marks
        seconds = done[-1][0] - began
        return sum(count for _, count in done) / seconds, len(done) / seconds


@dataclass(frozen=True)
class Launched:
    """An update under way, behind the one launched before it."""

    step: int
    batches: Sequence[Batch]
    learning_rate: float
    losses: Sequence[mx.array]
    norm: mx.array
    finite: mx.array
    clock: _Clock
    settings: TrainSettings

    def figures(self) -> dict[str, float]:
        """Wait for the update; its figures by metric name.

        Raises:
            StepError: loss, gradient or weights are not finite.
        """
        losses = [float(loss) for loss in self.losses]
        loss, norm = sum(losses), float(self.norm)
        if not math.isfinite(loss + norm):
            pairs = zip(self.batches, losses, strict=True)
            faulty = [batch for batch, part in pairs if not math.isfinite(part)]
            raise StepError(self._not_finite(f"loss {loss:g}, gradient norm {norm:g}", faulty))
        if not self.finite.item():
            raise StepError(self._not_finite("weights that are not finite after it"))
        tokens_s, updates_s = self.clock.stop(sum(batch.supervised_tokens for batch in self.batches))
        return {
            "train_loss": loss,
            "grad_norm": norm,
            "learning_rate": self.learning_rate,
            "tokens_per_second": tokens_s,
            "iterations_per_second": updates_s,
        }

    def _not_finite(self, what: str, batches: Sequence[Batch] = ()) -> str:
        rows = [row for batch in batches or self.batches for row in batch.rows.tolist()]
        return (
            f"step {self.step}: {what} on training rows {rows}; nothing of this step is kept. The usual "
            f"causes are a train.learning_rate that is too high ({self.settings.learning_rate:g}; other "
            "settings start again at step 0) and a row whose tokens are broken"
        )


def dropout_seed(seed: int, step: int, place: int) -> int:
    """The seed of MLX's global generator, from which nn.Dropout draws, set just before each batch."""
    return int(np.random.SeedSequence([seed, step, place]).generate_state(1, np.uint64)[0])
