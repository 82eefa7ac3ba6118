"""The training loop. It knows neither MLflow nor Prefect nor Optuna: it reports through one callback."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from tasks.config import TrainSettings
from tasks.errors import StepError
from tasks.prepare.splits import TokenRows
from tasks.progress import progress
from tasks.train.adapters import adapter_weights
from tasks.train.batches import Group, update_groups, updates_per_epoch
from tasks.train.checkpoints import Checkpoints
from tasks.train.footprint import process_footprint
from tasks.train.gradient_checkpoint import gradient_checkpoint
from tasks.train.interrupt import PutOffSignals
from tasks.train.loss import mean_loss
from tasks.train.memory_guard import MemoryGuard
from tasks.train.optimizers import make_optimizer, optimizer_state, restore_optimizer
from tasks.train.soft_prompt import prefix_ids, with_prefix
from tasks.train.state import Training
from tasks.train.update import Launched, Updates

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
    until_step: int | None = None,
    guard: MemoryGuard | None = None,
) -> Training:
    """Train the model's trainable parameters and keep those of the lowest validation loss.

    Order is a function of (seed, epoch), dropout of (seed, step, batch of the step). Validation covers
    `valid`, or its first `valid_rows`, before the first update, every `steps_per_eval` updates
    and after the last one. With `checkpoints` training goes on from the newest of them, and what is
    then found out equals that of a run that was never stopped; `report` gets the points before it too.

    Where `max_minutes` ends a run is the machine's doing, but what it ends is not: the updates, and the
    learning rates, which follow the steps planned, are the first of the same run without that limit.

    With `until_step` the training pauses there, validated and saved, and is not `ended_by` anything: called
    again it goes on. What it finds out is the same with and without pauses.

    SIGINT and SIGTERM take effect after the updates under way, two at most, with a checkpoint.

    Raises:
        ValueError: at `until_step` nothing is validated, or it could not be gone on from there.
        OverBudget: the run took more memory than `guard` allows; a checkpoint is kept.
        StepError: no token is supervised, or a loss, gradient or weight is not finite; no checkpoint
            holds anything of that step.
    """
    if until_step is not None and (checkpoints is None or until_step % settings.steps_per_eval):
        raise ValueError(f"a pause at step {until_step}: it needs checkpoints and a validation there")
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
    footprint = 0
    updates = Updates(model, optimizer, settings, training.steps)
    epoch_updates = updates_per_epoch(train, settings.batch_size, settings.accumulation_steps)
    recompute = gradient_checkpoint(model) if settings.grad_checkpoint else nullcontext()
    model.train()
    with recompute, PutOffSignals() as stop, progress("training", total=training.steps) as bar:
        bar.advance(training.step)
        under_way: deque[tuple[Group, Launched]] = deque()

        def launch() -> None:
            group = next(groups)
            under_way.append((group, updates.launch(group.batches, training.step + len(under_way) + 1)))

        def goes_on_after(step: int) -> bool:
            """Whether nothing is to be done with the weights as they are after that update."""
            saved = checkpoints and checkpoints.due(step)
            over = guard and guard.exceeded
            pause = saved or over or step % settings.steps_per_eval == 0 or stop.requested
            return not (pause or step >= training.steps or _time_is_up(training, settings))

        while True:
            if not under_way:
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
                if until_step is not None and training.step >= until_step:
                    save()
                    return training
                launch()
            if goes_on_after(training.step + 1):
                launch()  # the machine goes on while the figures of the update before are read
            group, launched = under_way.popleft()
            metrics = launched.figures()
            training.step += 1
            training.epoch, training.position = group.epoch, group.position
            training.trained_tokens += group.supervised_tokens
            note(
                {
                    **metrics,
                    "trained_tokens": training.trained_tokens,
                    "epoch": training.step / epoch_updates,
                    "peak_memory": mx.get_peak_memory() / 1e9,
                    "peak_footprint": (footprint := max(footprint, process_footprint())) / 1e9,
                }
            )
            over = guard and not under_way and guard.exceeded
            if over or (checkpoints and not under_way and checkpoints.due(training.step)):
                save()
            if guard and over:
                raise guard.refusal(training.step)
            bar.advance(1, f"loss {metrics['train_loss']:.3f}  {metrics['tokens_per_second']:.0f} tokens/s")
    if training.step < training.steps:
        log.info("ended after %d of %d steps by train.%s", training.step, training.steps, training.ended_by)
    return training


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
    return "max_minutes" if training.step and _time_is_up(training, settings) else ""


def _time_is_up(training: Training, settings: TrainSettings) -> bool:
    return settings.max_minutes is not None and training.seconds >= 60 * settings.max_minutes


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
