"""A tracking server that is stopped for a minute in mid-training costs no point (benchmarks/outage.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from outage import measure


@pytest.mark.slow
def test_a_minute_without_the_server_loses_and_doubles_no_point(home: Path) -> None:
    figures = measure(home, 60.0)
    assert (figures["lost"], figures["duplicated"]) == (0, 0)
    assert figures["points"] > 1000
