"""Imports point one way, and the heavy libraries stand only where the design puts them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from tasks.models.folder import ModelFolder

ROOT = Path(__file__).parent.parent
PACKAGES = ("flows", "search", "tasks")


def imported(path: Path) -> set[str]:
    """Top-level names of the packages a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def users_of(library: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in sources(package)
        if library in imported(path)
    }


def test_tasks_import_neither_flows_nor_search_and_search_not_flows() -> None:
    for path in sources("tasks"):
        assert not imported(path) & {"flows", "search"}, path
    for path in sources("search"):
        assert "flows" not in imported(path), path


def test_prefect_stands_in_flows_and_in_each_steps_task_only() -> None:
    steps = {path.parent.name for path in (ROOT / "tasks").glob("*/__init__.py")}
    steps -= {"export", "tracking"}  # what a command does, and what all steps write to
    users = {name for name in users_of("prefect") if not name.startswith("flows/")}
    assert users == {f"tasks/{step}/task.py" for step in steps}


def test_optuna_stands_in_search_only() -> None:
    assert all(name.startswith("search/") for name in users_of("optuna"))


def test_mlflow_stands_in_tracking_and_the_registry_only() -> None:
    assert {name.rpartition("/")[0] for name in users_of("mlflow")} == {"tasks/tracking", "tasks/register"}


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from flows.cli import run; run(['--help']);"
        "heavy = {'mlx', 'mlx_lm', 'prefect', 'mlflow', 'optuna', 'pandas', 'transformers', 'numpy'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_estimate_imports_no_prefect_and_no_mlflow(tiny_model: ModelFolder) -> None:
    command = [
        "estimate",
        "flows/configs/quickstart.yaml",
        f"model.source={tiny_model.path}",
        "train.num_layers=2",
    ]
    program = (
        f"import sys; from flows.cli import run; code = run({command!r});"
        "found = {'prefect', 'mlflow', 'optuna'} & set(sys.modules); sys.exit(' '.join(found) or code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
