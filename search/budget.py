"""The memory budget of a trial."""

from tasks.train.memory.budget import parse_budget

__all__ = ["parse_budget"]
