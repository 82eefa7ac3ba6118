"""The training loop. It knows neither MLflow nor Prefect nor Optuna: it reports through one callback."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from tasks.config import TrainSettings
from tasks.errors import StepError
from tasks.prepare.splits import TokenRows
from tasks.progress import progress
from tasks.train.adapters import adapter_weights
from tasks.train.batches import Batch, update_groups, updates_per_epoch
from tasks.train.checkpoints import Checkpoints
from tasks.train.gradient_checkpoint import gradient_checkpoint
from tasks.train.interrupt import PutOffSignals
from tasks.train.loss import batch_loss, mean_loss
from tasks.train.optimizers import make_optimizer, optimizer_state, restore_optimizer, set_learning_rate
from tasks.train.schedules import learning_rate_at
from tasks.train.soft_prompt import prefix_ids, with_prefix
from tasks.train.state import Training

log = logging.getLogger(__name__)

Report = Callable[[int, Mapping[str, float]], None]
"""Called with the number of updates done and the figures known then, by metric name."""


def fit(
    model: nn.Module,
    train: TokenRows,
    valid: TokenRows,
    settings: TrainSettings,
    report: Report,
    checkpoints: Checkpoints | None = None,
) -> Training:
    """Train the model's trainable parameters and keep those of the lowest validation loss.

    Order is a function of (seed, epoch), dropout of (seed, step, batch of the step). Validation covers
    `valid`, or its first `valid_rows`, before the first update, every `steps_per_eval` updates
    and after the last one. With `checkpoints` training goes on from the newest of them, and what is
    then found out equals that of a run that was never stopped; `report` gets the points before it too.

    Where `max_minutes` ends a run is the machine's doing, but what it ends is not: the updates, and the
    learning rates, which follow the steps planned, are the first of the same run without that limit.

    SIGINT and SIGTERM take effect after the update under way, with a checkpoint.

    Raises:
        StepError: no token is supervised, or a loss, gradient or weight is not finite; no checkpoint
            holds anything of that step.
    """
    if settings.valid_rows:
        valid = valid.first(settings.valid_rows)
    in_front = prefix_ids(model)
    train, valid = with_prefix(train, in_front), with_prefix(valid, in_front)
    _check_rows(train, valid)
    mx.reset_peak_memory()
    optimizer = make_optimizer(settings)
    training = _resumed(model, optimizer, settings, checkpoints) or _begun(train, settings)
    earlier_s, earlier_peak, started = training.seconds, training.peak_memory, time.perf_counter()
    for step, metrics in training.history:
        report(step, metrics)

    def note(metrics: dict[str, float]) -> None:
        training.seconds = earlier_s + time.perf_counter() - started
        training.peak_memory = max(earlier_peak, mx.get_peak_memory() / 1e9)
        training.note(metrics)
        report(training.step, metrics)

    def save() -> None:
        if checkpoints:
            checkpoints.save(training, adapter_weights(model), optimizer_state(optimizer))

    groups = update_groups(
        train,
        settings.batch_size,
        settings.accumulation_steps,
        settings.seed,
        training.epoch,
        training.position,
    )
    epoch_updates = updates_per_epoch(train, settings.batch_size, settings.accumulation_steps)
    recompute = gradient_checkpoint(model) if settings.grad_checkpoint else nullcontext()
    model.train()
    with recompute, PutOffSignals() as stop, progress("training", total=training.steps) as bar:
        bar.advance(training.step)
        while True:
            limit = _limit_reached(training, settings)
            if (limit or training.step % settings.steps_per_eval == 0) and not training.validated:
                title = f"validation at {training.step}"
                loss = mean_loss(model, valid, settings.batch_size, title, lambda: stop.requested)
                if not stop.requested:
                    note({"val_loss": _finite_val_loss(loss, training)})
                    _keep_best(training, model)
            if stop.requested:
                save()
                stop.act()
                continue  # whoever handles the signal chose to go on
            training.ended_by = limit or _patience_lost(training, settings)
            if training.ended_by:
                break
            group = next(groups)
            metrics = update(model, optimizer, group.batches, training.step + 1, training.steps, settings)
            training.step += 1
            training.epoch, training.position = group.epoch, group.position
            training.trained_tokens += group.supervised_tokens
            note(
                {
                    **metrics,
                    "trained_tokens": training.trained_tokens,
                    "epoch": training.step / epoch_updates,
                    "peak_memory": mx.get_peak_memory() / 1e9,
                }
            )
            if checkpoints and checkpoints.due(training.step):
                save()
            bar.advance(1, f"loss {metrics['train_loss']:.3f}  {metrics['tokens_per_second']:.0f} tokens/s")
    if training.step < training.steps:
        log.info("ended after %d of %d steps by train.%s", training.step, training.steps, training.ended_by)
    return training


def update(
    model: nn.Module,
    optimizer: optim.Optimizer,
    batches: Sequence[Batch],
    step: int,
    steps: int,
    settings: TrainSettings,
) -> dict[str, float]:
    """One optimizer step over a group of batches, evaluated; its figures by metric name."""
    started = time.perf_counter()
    set_learning_rate(optimizer, rate := learning_rate_at(step, steps, settings))
    losses, gradient = accumulated_gradient(model, batches, step, settings)
    gradient, norm = optim.clip_grad_norm(gradient, settings.max_grad_norm or math.inf)
    if not math.isfinite(sum(losses) + norm.item()):
        faulty = [each for each, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
        figures = f"loss {sum(losses):g}, gradient norm {norm.item():g}"
        raise StepError(_not_finite(step, figures, faulty or batches, settings))
    optimizer.update(model, gradient)
    mx.eval(model.trainable_parameters(), optimizer.state)
    if not _all_finite(adapter_weights(model)):
        raise StepError(_not_finite(step, "weights that are not finite after it", batches, settings))
    seconds = time.perf_counter() - started
    return {
        "train_loss": sum(losses),
        "grad_norm": norm.item(),
        "learning_rate": rate,
        "tokens_per_second": sum(batch.supervised_tokens for batch in batches) / seconds,
        "iterations_per_second": 1 / seconds,
    }


def accumulated_gradient(
    model: nn.Module, batches: Sequence[Batch], step: int, settings: TrainSettings
) -> tuple[list[float], Any]:
    """Gradient of the mean loss over all supervised tokens of a group, one batch in memory at a time.

    Each batch counts by its share of the group's tokens, so that this equals the gradient of one big
    batch to float rounding.

    Returns:
        What each batch adds to the mean loss, and the gradient as a tree.
    """
    tokens = sum(batch.supervised_tokens for batch in batches)
    loss_and_grad = nn.value_and_grad(model, lambda batch, share: share * batch_loss(model, batch))
    losses: list[float] = []
    gradient: Any = None
    for place, batch in enumerate(batches):
        if settings.dropout:
            mx.random.seed(dropout_seed(settings.seed, step, place))
        loss, part = loss_and_grad(batch, batch.supervised_tokens / tokens)
        gradient = part if gradient is None else tree_map(mx.add, gradient, part)
        mx.eval(loss, gradient)
        losses.append(loss.item())
    return losses, gradient


def dropout_seed(seed: int, step: int, place: int) -> int:
    """The seed of MLX's global generator, from which nn.Dropout draws, set just before each batch."""
    return int(np.random.SeedSequence([seed, step, place]).generate_state(1, np.uint64)[0])


def total_steps(train: TokenRows, settings: TrainSettings) -> int:
    """Updates in the run: epochs over all rows, rounded up, no more than `max_steps`."""
    epoch_updates = updates_per_epoch(train, settings.batch_size, settings.accumulation_steps)
    steps = math.ceil(settings.epochs * epoch_updates)
    return min(steps, settings.max_steps) if settings.max_steps else steps


def _check_rows(train: TokenRows, valid: TokenRows) -> None:
    for rows, use in ((train, "training rows have"), (valid, "validation rows have")):
        if not rows.supervised.any():
            raise StepError(f"the {use} no supervised token: nothing can be learnt or measured")


def _begun(train: TokenRows, settings: TrainSettings) -> Training:
    return Training(
        total_steps(train, settings), settings.seed, settings.batch_size, settings.accumulation_steps
    )


def _resumed(
    model: nn.Module, optimizer: optim.Optimizer, settings: TrainSettings, checkpoints: Checkpoints | None
) -> Training | None:
    """Put model and optimizer where the newest whole checkpoint left them; None when there is none.

    Raises:
        StepError: it is the checkpoint of another run, whose place in the data means nothing here.
    """
    checkpoint = checkpoints.newest() if checkpoints else None
    if checkpoint is None:
        return None
    training = checkpoint.training
    place = (training.seed, training.batch_size, training.accumulation_steps)
    ours = (settings.seed, settings.batch_size, settings.accumulation_steps)
    if place != ours or checkpoint.weights.keys() != adapter_weights(model).keys():
        raise StepError(f"{checkpoint.path} is the checkpoint of a training with other settings; remove it")
    model.load_weights(list(checkpoint.weights.items()), strict=False)
    restore_optimizer(optimizer, model, checkpoint.optimizer)
    log.info("resuming at step %d of %d from %s", training.step, training.steps, checkpoint.path)
    return training


def _limit_reached(training: Training, settings: TrainSettings) -> str:
    """The setting that ends the run here whatever its losses, or nothing."""
    if training.step >= training.steps:
        return "max_steps" if training.steps == settings.max_steps else "epochs"
    minutes = settings.max_minutes
    return "max_minutes" if minutes and training.step and training.seconds >= 60 * minutes else ""


def _patience_lost(training: Training, settings: TrainSettings) -> str:
    lost = settings.patience and training.validations_without_gain(settings.min_gain) >= settings.patience
    return "patience" if lost else ""


def _keep_best(training: Training, model: nn.Module) -> None:
    loss = training.val_losses[-1]
    if training.step and loss < training.best_val_loss:
        training.best_val_loss, training.best_step = loss, training.step
        training.best_weights = adapter_weights(model)


def _finite_val_loss(loss: float, training: Training) -> float:
    """The loss; before training it may be anything, as the first update names the rows of a broken one."""
    if training.step and not math.isfinite(loss):
        raise StepError(
            f"validation loss is {loss:g} after step {training.step}; "
            "lower train.learning_rate, or look for a broken validation row"
        )
    return loss


def _not_finite(step: int, what: str, batches: Sequence[Batch], settings: TrainSettings) -> str:
    rows = [row for batch in batches for row in batch.rows.tolist()]
    return (
        f"step {step}: {what} on training rows {rows}; nothing of this step is kept. The usual causes are "
        f"a train.learning_rate that is too high ({settings.learning_rate:g}; other settings start again at "
        "step 0) and a row whose tokens are broken"
    )


def _all_finite(weights: Mapping[str, mx.array]) -> bool:
    return bool(mx.stack([mx.isfinite(array).all() for array in weights.values()]).all().item())
