"""The training loop. It knows neither MLflow nor Prefect nor Optuna: it reports through one callback."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from tasks.config import TrainSettings
from tasks.errors import StepError
from tasks.prepare.splits import TokenRows
from tasks.progress import progress
from tasks.train.adapters import adapter_weights
from tasks.train.batches import Batch, steps_per_epoch, training_batches
from tasks.train.loss import batch_loss, mean_loss, supervised
from tasks.train.optimizers import make_optimizer
from tasks.train.schedules import learning_rate_at

Report = Callable[[int, Mapping[str, float]], None]
"""Called with the number of updates done and the figures known then, by metric name."""


@dataclass
class Training:
    """What a training run found out.

    Attributes:
        best_weights: the adapter whose validation loss is `best_val_loss`.
        history: (updates done, metrics) in order, as reported.
        peak_memory: of MLX, in GB (1e9 bytes).
    """

    steps: int
    val_loss_before: float
    best_val_loss: float = math.inf
    best_step: int = 0
    best_weights: dict[str, mx.array] = field(default_factory=dict)
    trained_tokens: int = 0
    seconds: float = 0.0
    peak_memory: float = 0.0
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Everything but the weights, as plain values."""
        return {name: value for name, value in asdict(self).items() if name != "best_weights"}


def fit(
    model: nn.Module, train: TokenRows, valid: TokenRows, settings: TrainSettings, report: Report
) -> Training:
    """Train the model's trainable parameters and keep those of the lowest validation loss.

    Order is a function of (seed, epoch), dropout of (seed, step). Validation covers all of `valid`
    before the first update, every `steps_per_eval` updates and after the last one.

    Raises:
        StepError: no token is supervised, or a loss or gradient is not finite; the model is left
            as it was before that step.
    """
    if not train.supervised.any():
        raise StepError("the training rows have no supervised token: there is nothing to learn")
    started = time.perf_counter()
    mx.reset_peak_memory()
    steps = total_steps(train, settings)
    validate = partial(mean_loss, model, valid, settings.batch_size)
    result = Training(steps, val_loss_before=validate("validation before"))

    def note(step: int, metrics: dict[str, float]) -> None:
        result.history.append((step, metrics))
        report(step, metrics)

    note(0, {"val_loss": result.val_loss_before})
    optimizer = make_optimizer(settings)
    model.train()
    with progress("training", total=steps) as bar:
        for step, batch in enumerate(batches_of(train, settings, steps), start=1):
            metrics = update(model, optimizer, batch, step, steps, settings)
            result.trained_tokens += batch.supervised_tokens
            metrics |= {
                "trained_tokens": result.trained_tokens,
                "epoch": step / steps_per_epoch(train, settings.batch_size),
                "peak_memory": mx.get_peak_memory() / 1e9,
            }
            bar.advance(1, f"loss {metrics['train_loss']:.3f}  {metrics['tokens_per_second']:.0f} tokens/s")
            if step % settings.steps_per_eval == 0 or step == steps:
                metrics["val_loss"] = validate(f"validation at {step}")
                if metrics["val_loss"] < result.best_val_loss:
                    result.best_val_loss, result.best_step = metrics["val_loss"], step
                    result.best_weights = adapter_weights(model)
            note(step, metrics)
    if not result.best_weights:
        raise StepError(f"validation loss was not finite after {steps} steps; lower train.learning_rate")
    result.seconds = time.perf_counter() - started
    result.peak_memory = mx.get_peak_memory() / 1e9
    return result


def update(
    model: nn.Module,
    optimizer: optim.Optimizer,
    batch: Batch,
    step: int,
    steps: int,
    settings: TrainSettings,
) -> dict[str, float]:
    """One optimizer step, evaluated; its figures by metric name."""
    started = time.perf_counter()
    if settings.dropout:
        # nn.Dropout draws from MLX's global generator: set it from (seed, step) just before use.
        mx.random.seed(settings.seed * 1_000_003 + step)
    optimizer.learning_rate = learning_rate_at(step, steps, settings)
    loss_and_grad = nn.value_and_grad(model, partial(batch_loss, model))
    loss, gradient = loss_and_grad(batch)
    gradient, norm = optim.clip_grad_norm(gradient, settings.max_grad_norm)
    mx.eval(loss, norm)
    if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
        raise StepError(
            f"step {step}: loss {loss.item():g}, gradient norm {norm.item():g} on rows "
            f"{batch.rows.tolist()}; the usual causes are a learning rate that is too high "
            f"({settings.learning_rate:g}) and a row whose tokens are broken"
        )
    optimizer.update(model, gradient)
    mx.eval(model.trainable_parameters(), optimizer.state)
    seconds = time.perf_counter() - started
    return {
        "train_loss": loss.item(),
        "grad_norm": norm.item(),
        "learning_rate": float(optimizer.learning_rate),
        "tokens_per_second": batch.supervised_tokens / seconds,
        "iterations_per_second": 1 / seconds,
    }


def batches_of(train: TokenRows, settings: TrainSettings, steps: int) -> Iterator[Batch]:
    """The first `steps` batches that teach anything, in training order."""
    return islice(filter(supervised, training_batches(train, settings.batch_size, settings.seed)), steps)


def total_steps(train: TokenRows, settings: TrainSettings) -> int:
    """Updates in the run: epochs over all rows, rounded up, no more than `max_steps`."""
    steps = math.ceil(settings.epochs * steps_per_epoch(train, settings.batch_size))
    return min(steps, settings.max_steps) if settings.max_steps else steps
