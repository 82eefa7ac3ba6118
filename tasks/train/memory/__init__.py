"""The memory model: what a run will take, what fits, and what it took."""

from tasks.train.memory.budget import free_memory
from tasks.train.memory.estimate import MemoryEstimate, estimate_from_config, estimate_memory
from tasks.train.memory.row_sizes import RowSizes

__all__ = ["MemoryEstimate", "RowSizes", "estimate_from_config", "estimate_memory", "free_memory"]
