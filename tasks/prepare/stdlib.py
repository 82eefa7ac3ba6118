"""The built-in dataset `stdlib`: what the running Python's standard library says about itself.

A row asks "What does textwrap.dedent do?" and is answered by the first paragraph of that docstring.
Python modules are parsed, never imported: no module's code runs, nothing is printed, and what is
read does not depend on the environment. Docstrings of the few modules written in C are asked of
the modules themselves; those in `NATIVE_MODULES` do nothing when imported. The same interpreter
gives the same rows in the same order.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sysconfig
import types
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tasks.prepare.rows import Row

# Games, graphical toolkits that some systems leave out, tests, and tools gone in later Pythons.
LEFT_OUT = {
    "antigravity", "config", "distutils", "ensurepip", "idlelib", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "this", "tkinter", "turtle", "turtledemo",
}  # fmt: skip

NATIVE_MODULES = (
    "array", "atexit", "binascii", "builtins", "cmath", "gc", "itertools", "marshal", "math", "sys", "time",
    "unicodedata", "zlib",
)  # fmt: skip

SHORTEST_ANSWER, LONGEST_ANSWER = 20, 600  # characters

Documented = Iterator[tuple[str, str]]


@cache
def stdlib_rows() -> tuple[Row, ...]:
    """About 1,850 conversations, ordered by the name asked about.

    Asked about are public functions and classes, and the methods of built-in types. Of equal answers the
    first by name is kept.
    """
    answers: dict[str, str] = {}
    for name, docstring in sorted([*_python_docstrings(), *_native_docstrings()]):
        answer = first_paragraph(docstring)
        if SHORTEST_ANSWER <= len(answer) <= LONGEST_ANSWER and not ADDRESS.search(answer):
            answers.setdefault(answer, name)
    return tuple(
        Row(line, "messages", _conversation(name, answer))
        for line, (answer, name) in enumerate(answers.items(), start=1)
    )


def first_paragraph(docstring: str) -> str:
    """The first paragraph that is neither signature nor example, on one line; empty when there is none."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = [line.strip() for line in paragraph.splitlines()]
        while lines and SIGNATURE.match(lines[0]):
            lines = lines[1:]
        text = " ".join(" ".join(lines).split())
        if text.strip("-= ") and not text.startswith(">>>"):
            return text
    return ""


ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")
SIGNATURE = re.compile(r"^[\w.]+ ?\(.*\)( *(->|=>|--|=|:).*)?$")


def _conversation(name: str, answer: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"What does {name} do?"},
        {"role": "assistant", "content": answer},
    ]


def _python_docstrings() -> Documented:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not all(part == "__init__" or _is_public(part) for part in parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escape sequences, which are not ours to mend
            tree = ast.parse(path.read_bytes())
        yield from _documented(module, tree)


def _is_public(part: str) -> bool:
    return part.isidentifier() and not part.startswith("_") and part not in LEFT_OUT


def _documented(module: str, tree: ast.Module) -> Documented:
    exported = _exported(tree)
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_") or (exported is not None and node.name not in exported):
            continue
        if docstring := ast.get_docstring(node):
            yield f"{module}.{node.name}", docstring


def _exported(tree: ast.Module) -> set[str] | None:
    """The names of a plainly written `__all__`; None without one."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Tuple):
            targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "__all__" in targets:
                return {str(item.value) for item in node.value.elts if isinstance(item, ast.Constant)}
    return None


def _native_docstrings() -> Documented:
    for module_name in NATIVE_MODULES:
        place = "" if module_name == "builtins" else f"{module_name}."
        for name, member in sorted(vars(importlib.import_module(module_name)).items()):
            # Hooks and what `site` adds are replaced by whoever likes; C's own functions are not.
            if isinstance(member, types.BuiltinFunctionType | type) and not name.endswith("hook"):
                yield from _documented_object(place, name, member)


def _documented_object(place: str, name: str, member: object) -> Documented:
    is_alias = getattr(member, "__name__", name) != name
    if name.startswith("_") or is_alias or not callable(member):
        return
    if docstring := inspect.getdoc(member):
        yield f"{place}{name}", docstring
    if isinstance(member, type):
        for inner_name, inner in sorted(vars(member).items()):
            yield from _documented_object(f"{place}{name}.", inner_name, inner)
