"""Learning rate as a plain function of the step."""

from __future__ import annotations

import math

from tasks.config import TrainSettings


def learning_rate_at(step: int, steps: int, settings: TrainSettings) -> float:
    """The learning rate of update `step` (from 1) out of `steps`.

    Linear warm-up over `warmup_steps`, reaching the peak on the last of them; then constant, or
    falling to `final_lr_share` of the peak linearly or along half a cosine.
    """
    warmup = min(settings.warmup_steps, steps)
    if step <= warmup:
        return settings.learning_rate * step / warmup
    done = (step - warmup) / max(steps - warmup, 1)  # 0 … 1
    floor = settings.final_lr_share
    if settings.schedule == "linear":
        share = 1 - (1 - floor) * done
    elif settings.schedule == "cosine":
        share = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    else:
        share = 1.0
    return settings.learning_rate * share
