"""Importing mlx_lm without what it does to the process."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


def import_mlx_lm() -> None:
    """Import mlx_lm and leave the limit on open files as it was.

    `mlx_lm.utils` (0.32.2) sets RLIMIT_NOFILE to (2048, 4096) when imported. Without privileges a
    lowered hard limit cannot be raised again, so the call is held off instead of being undone.
    Call this before the first `import mlx_lm` of a process. Remove it when mlx_lm only raises the limit.
    """
    with _limits_held():
        import mlx_lm  # noqa: F401


@contextmanager
def _limits_held() -> Iterator[None]:
    real = resource.setrlimit

    def hold(which: int, limits: tuple[int, int], /) -> None:
        if which != resource.RLIMIT_NOFILE:
            real(which, limits)

    resource.setrlimit = hold
    try:
        yield
    finally:
        resource.setrlimit = real
