"""The memory budget of a trial."""

from tasks.budget import parse_budget

__all__ = ["parse_budget"]
