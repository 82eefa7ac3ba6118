"""What of a backend decides memory: how far MLX runs ahead of it, and in what type weights are held."""

from __future__ import annotations

import math
import os
from dataclasses import replace

from tasks.models.device import on_gpu, own_memory_bytes
from tasks.train.memory.replay import Pace

TASKS = 10
"""MAX_ACTIVE_TASKS of mlx/transforms.cpp, the same on every backend."""

MEBI = 2**20

CPU = Pace(TASKS, dispatches=10, numbers=None, of_operation=2, of_view=1, page_bytes=1)
"""DISPATCHES_PER_TASK of mlx/backend/cpu/encoder.h; an operation is one, giving back what it read another."""

METAL = Pace(TASKS, dispatches=40, numbers=40 * MEBI, of_operation=1, of_view=0, page_bytes=16384)
"""`max_ops_per_buffer_` and `max_mb_per_buffer_` of mlx/backend/metal/device.cpp, of a base or pro chip; what
is counted there as megabytes are numbers."""

CUDA = Pace(TASKS, dispatches=100, numbers=1000 * MEBI, of_operation=1, of_view=0, page_bytes=16384)
"""`get_graph_limits` of mlx/backend/cuda/device.cpp, of compute capability 9.0 and 10.0, and the page of its
allocator; numbers as on Metal."""


def pace() -> Pace:
    """Of MLX's default device, as this process's environment has it."""
    if not on_gpu():
        return CPU
    usual = CUDA if own_memory_bytes() else METAL
    operations, numbers = (os.environ.get(f"MLX_MAX_{of}_PER_BUFFER") for of in ("OPS", "MB"))
    return replace(
        usual,
        dispatches=int(operations) if operations else usual.dispatches,
        numbers=int(numbers) * MEBI if numbers else usual.numbers,
    )


LEAST_OPERATIONS = 8
"""Of a transformer's layer, forward; most have twice as many."""


def layers_in_sight(ahead: Pace) -> int:
    """Frozen layers that MLX may have under way at once, and two more."""
    return 2 + math.ceil(ahead.tasks * ahead.dispatches / (ahead.of_operation * LEAST_OPERATIONS))
