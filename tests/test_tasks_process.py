"""A process is set up before the libraries are imported: BLAS first, telemetry off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks import process
from tasks.process import DEFAULTS, blas_advice, load_blas, needs_blas

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Accelerate is fast by itself")


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_tasks_sets_the_quiet_defaults_and_keeps_a_persons_own() -> None:
    program = "import os, tasks; print(os.environ['DO_NOT_TRACK'], os.environ['MLFLOW_LOGGING_LEVEL'])"
    assert run(program, DO_NOT_TRACK="0", MLFLOW_LOGGING_LEVEL="DEBUG") == "0 DEBUG"
    assert set(DEFAULTS) <= os.environ.keys()


@LINUX
def test_blas_is_in_the_process_before_mlx() -> None:
    if load_blas() is None:
        pytest.fail("no fast BLAS on this machine: apt-get install libopenblas0-pthread, or pip install mkl")
    program = (
        "import sys, tasks, pathlib; assert 'mlx' not in sys.modules; print(open('/proc/self/maps').read())"
    )
    loaded = run(program)
    assert "openblas" in loaded or "libmkl_rt" in loaded


@LINUX
def test_without_a_fast_blas_one_line_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "load_blas", lambda: None)
    assert needs_blas()
    assert "libopenblas0-pthread" in str(blas_advice())
    monkeypatch.setattr(process, "load_blas", lambda: "libopenblas.so.0")
    assert not needs_blas()
    assert blas_advice() is None


@LINUX
def test_mkl_of_the_environment_is_taken_where_the_system_has_no_openblas(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmkl_rt.so.3").touch()
    taken = []

    def load(name: str, mode: int) -> None:
        if "openblas" in name:
            raise OSError
        taken.append(name)

    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(process.ctypes, "CDLL", load)
    assert load_blas.__wrapped__() == taken[0] == str(tmp_path / "lib" / "libmkl_rt.so.3")
