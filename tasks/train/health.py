"""What the curves of a finished training tell: sentences about what went wrong, with the usual remedies.

Pure functions of the history. Their thresholds are wide on purpose: a run that did well is told
nothing, because advice that is given every time is read by nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

History = Sequence[tuple[int, Mapping[str, float]]]

VAL_RISE = 0.02
"""Of the best: a smaller rise is within what another choice of some hundred validation rows would give."""

TRAIN_RISE = 0.05
"""Between means over a tenth of the run each: batches differ, their means over ten and more hardly."""

PLATEAU_FALL = 0.005
"""Of the loss at half time: less than half a percent for half the time is not worth that time."""

FEWEST_UPDATES = 100
"""So that a tenth of the training losses is a mean over ten at least."""

FEWEST_VALIDATIONS = 4
"""After the one before training: two in each half of the run."""


def advice(history: History) -> list[str]:
    """What is noticed, worst first; empty for a healthy run.

    Args:
        history: (updates done, metrics) in order, with `train_loss` and, now and then, `val_loss`.
    """
    return [told for told in (divergence(history), overfitting(history), plateau(history)) if told]


def divergence(history: History) -> str | None:
    """Training made the loss of its own rows worse: its last tenth is over its first."""
    losses = [loss for _, loss in _curve(history, "train_loss")]
    if len(losses) < FEWEST_UPDATES:
        return None
    tenth = len(losses) // 10
    first, last = fmean(losses[:tenth]), fmean(losses[-tenth:])
    if last <= first * (1 + TRAIN_RISE):
        return None
    return (
        f"Divergence: train_loss rose from {first:.3f} (first tenth of the run) to {last:.3f} (last tenth). "
        "Lower train.learning_rate to a third, or lengthen train.warmup_steps."
    )


def overfitting(history: History) -> str | None:
    """Validation loss rose from its best to the end while training loss went on falling."""
    validations = _curve(history, "val_loss")
    if len(validations) < 3:
        return None
    best_step, best = min(validations, key=lambda point: point[1])
    last_step, last = validations[-1]
    before = [loss for step, loss in _curve(history, "train_loss") if step <= best_step]
    after = [loss for step, loss in _curve(history, "train_loss") if step > best_step]
    if last <= best * (1 + VAL_RISE) or not (before and after) or fmean(after) >= fmean(before):
        return None
    return (
        f"Overfitting: val_loss rose from {best:.3f} at step {best_step} to {last:.3f} at step {last_step} "
        "while train_loss fell. The adapter of the best step is kept. Fewer train.epochs or train.patience "
        "save the time; more rows, a smaller train.rank or train.dropout help."
    )


def plateau(history: History) -> str | None:
    """The second half of the run brought validation loss hardly any lower, and no higher either."""
    validations = _curve(history, "val_loss")
    if len(validations) <= FEWEST_VALIDATIONS:
        return None
    half_time = validations[-1][0] / 2
    half = min(loss for step, loss in validations if step <= half_time)
    whole = min(loss for _, loss in validations)
    rose = validations[-1][1] > whole * (1 + VAL_RISE)
    if rose or half - whole >= PLATEAU_FALL * half:
        return None
    return (
        f"Plateau: val_loss was {half:.3f} at half time and {whole:.3f} at best. Half the train.epochs would "
        "have done; for a lower loss raise train.rank, train.num_layers or train.learning_rate, or give more "
        "rows."
    )


def _curve(history: History, name: str) -> list[tuple[int, float]]:
    return [(step, metrics[name]) for step, metrics in history if name in metrics]
