"""What measured runs say about the replay, kept for this machine, backend and version of MLX."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.train.memory.estimate import Breakdown


@dataclass(frozen=True)
class Calibration:
    """How measured peaks relate to replayed ones.

    Attributes:
        ratio: of what changes in a step, measured over replayed.
    """

    ratio: float = 1.0

    def applied(self, replayed: Breakdown) -> Breakdown:
        """The breakdown with the difference as slack."""
        changing = replayed.gradients + replayed.activations + replayed.logits
        return replace(replayed, slack=round((self.ratio - 1) * changing))


def calibration() -> Calibration:
    """This machine's."""
    return Calibration()
