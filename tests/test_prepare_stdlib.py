"""The built-in dataset is the same in every process of the same interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tasks.prepare.stdlib import ADDRESS, _python_docstrings, first_paragraph, stdlib_rows

DIGEST = (
    "import hashlib\nfrom tasks.prepare.stdlib import stdlib_rows\n"
    "print(hashlib.sha256(repr(stdlib_rows()).encode()).hexdigest())"
)


@pytest.mark.slow
def test_rows_are_the_same_whatever_the_hash_seed_and_nothing_is_printed() -> None:
    checkout = str(Path(__file__).parent.parent)
    digests = set()
    for seed, home in (("1", "/"), ("2", checkout)):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "HOME": home, "PYTHONPATH": checkout}
        command = [sys.executable, "-W", "always::SyntaxWarning", "-c", DIGEST]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        digests.add(done.stdout)
    assert len(digests) == 1
    assert re.fullmatch(r"[0-9a-f]{64}\n", digests.pop())


def test_modules_are_read_but_not_imported() -> None:
    command = "import sys\nfrom tasks.prepare.stdlib import stdlib_rows\nstdlib_rows()\n"
    command += "print(sorted({'antigravity', 'this', 'idlelib', 'tkinter', 'smtplib'} & {*sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.stdout == "[]\n"


def test_only_public_names_are_read_and_old_escapes_warn_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    module = "__all__ = ['shown', '_private']\nPATTERN = '\\d'\n"
    for name in ("shown", "hidden", "_private"):
        module += f"def {name}():\n    'Does what {name} does.'\n"
    for name in ("one.py", "_two.py", "turtle.py", "test/three.py", "site-packages/four.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(module)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(_python_docstrings()) == [("one.shown", "Does what shown does.")]
    assert not recwarn.list


def test_there_are_as_many_rows_as_the_quickstart_says() -> None:
    assert 1700 <= len(stdlib_rows()) <= 2100


def test_answers_are_public_distinct_and_of_a_fit_length() -> None:
    answers = [row.messages[1]["content"] for row in stdlib_rows()]
    assert len(set(answers)) == len(answers)
    for row, answer in zip(stdlib_rows(), answers, strict=True):
        name = row.messages[0]["content"].removeprefix("What does ").removesuffix(" do?")
        assert not any(part.startswith("_") for part in name.split("."))
        assert 20 <= len(answer) <= 600
        assert answer == " ".join(answer.split())
        assert not ADDRESS.search(answer)


def test_a_known_function_is_answered_by_its_docstring() -> None:
    answers = {row.messages[0]["content"]: row.messages[1]["content"] for row in stdlib_rows()}
    dedent = answers["What does textwrap.dedent do?"]
    assert dedent.startswith("Remove any common leading whitespace from every line")
    assert answers["What does math.hypot do?"].startswith("Multidimensional Euclidean distance")


@pytest.mark.parametrize(
    ("docstring", "paragraph"),
    [
        ("One\n  two.\n\nThree.", "One two."),
        ("max(iterable) -> value\nmax(a, b) -> value\n\nWith one argument.", "With one argument."),
        ("deque(x) --> deque object\nBuild it.", "Build it."),
        ("-----\n\nText.", "Text."),
        (">>> f(1)\n2\n\nText.", "Text."),
        ("f(x)", ""),
    ],
)
def test_the_first_paragraph_is_prose(docstring: str, paragraph: str) -> None:
    assert first_paragraph(docstring) == paragraph
