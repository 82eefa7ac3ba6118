"""What a run asks of the machine, sampled beside it: MLflow shows `system/…` figures on a page of their own.

MLflow's own monitor writes through its client, whose calls hang while a server is down; these go through
the run's outbox like every other figure. The step is the second since the run was opened, so that a run
that is resumed goes on with its curves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tasks.home import runs_dir

if TYPE_CHECKING:
    import psutil

    from tasks.tracking import Run

EVERY_S = 10.0


@contextmanager
def system_metrics(run: Run, started_ms: int) -> Iterator[None]:
    """Report the machine's figures every ten seconds while the block runs.

    Args:
        started_ms: when the run was first opened, since 1970.
    """
    import psutil

    process, over = psutil.Process(), threading.Event()
    psutil.cpu_percent()  # of the time since the last call: the first says nothing

    def sample() -> None:
        while not over.wait(EVERY_S):
            run.report(max(0, int(time.time() - started_ms / 1000)), figures(process))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def figures(process: psutil.Process) -> dict[str, float]:
    """The figures under MLflow's names, and this process's own memory."""
    import psutil

    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(runs_dir()))
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / 1e6,
        "process_memory_megabytes": process.memory_info().rss / 1e6,
        **_gpu_figures(),
    }
    return {f"system/{name}": round(value, 1) for name, value in found.items()}


def _gpu_figures() -> dict[str, float]:
    """What MLX holds of the memory of a GPU; on a CPU that is in the process's own."""
    from tasks.models.device import on_gpu

    if not on_gpu():
        return {}
    import mlx.core as mx

    return {"mlx_memory_megabytes": mx.get_active_memory() / 1e6}
