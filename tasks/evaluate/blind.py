"""A blind comparison of two models' answers: the pairs, their order, and the key to who is on which side.

    mlruns/ab/secret                      random bytes of this machine: with the seed they give ids and order
    mlruns/ab/<comparison>/key.json       whose answer is left in which pair: for the tally alone
    mlruns/ab/<comparison>/blind.html     the page, which knows nothing of that
    mlruns/ab/<comparison>/verdicts/      what was tallied, a file a reviewer

Without the secret the seed alone would give the order away to whoever knows it, and it is 0 unless somebody
chose another.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import random
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tasks.errors import InputError
from tasks.home import runs_dir
from tasks.publish import fingerprint, sync

KEY_FORMAT = "tunesmith key 1"
VERDICTS_FORMAT = "tunesmith verdicts 1"

CRITERIA = ("accuracy", "relevance", "coherence", "completeness", "overall")
"""What an answer may be rated for, from 1 to `BEST`."""

BEST = 5

CHOICES = ("left", "right", "tie")

Choice = Literal["left", "right", "tie"]
Letter = Literal["a", "b"]

LETTERS: tuple[Letter, Letter] = ("a", "b")


@dataclass(frozen=True)
class Contestant:
    """A model that answered the test prompts.

    Attributes:
        run_id: the MLflow run to which figures about it belong; None for a base model, which has none.
        name: as a person knows it.
        tag: as metrics of the other side name it.
    """

    run_id: str | None
    name: str
    tag: str


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, by side; the id says nothing."""

    id: str
    prompt: str
    reference: str
    left: str
    right: str


@dataclass(frozen=True)
class Key:
    """What turns verdicts about sides into verdicts about models.

    Attributes:
        comparison: its id.
        token: by which the page seals its verdicts.
        a, b: the models.
        identical: prompts that both answered with the same text; they are ties, and not shown.
        left: by pair, whose answer is on the left.
    """

    comparison: str
    token: str
    seed: int
    a: Contestant
    b: Contestant
    identical: int
    left: Mapping[str, Letter]

    def contestant(self, letter: Letter) -> Contestant:
        """The model that `letter` means."""
        return self.a if letter == "a" else self.b

    def winner(self, pair: str, choice: Choice) -> Letter | None:
        """Whose answer was chosen; None for a tie."""
        if choice == "tie":
            return None
        return self.left[pair] if choice == "left" else other(self.left[pair])


@dataclass(frozen=True)
class Comparison:
    """Pairs in the order in which they are shown, and their key."""

    key: Key
    pairs: tuple[Pair, ...]


Answers = Mapping[tuple[str, str], str]
"""By prompt and reference."""


def compare(
    a: Contestant, answers_a: Answers, b: Contestant, answers_b: Answers, seed: int, most: int | None = None
) -> Comparison:
    """Pair the answers to the same prompts, `most` of them, each model on the left in half of the pairs.

    The same call on the same machine gives the same comparison, so that a page that is made again goes
    on with what a browser has kept of it.

    Raises:
        InputError: no prompt is common to both, or they answer every one with the same text.
    """
    common = [row for row in answers_a if row in answers_b]
    if not common:
        raise InputError(
            f"{a.name} and {b.name} have no test prompt in common ({len(answers_a)} and {len(answers_b)}); "
            "evaluate both on the same data"
        )
    told_apart = [row for row in common if answers_a[row].strip() != answers_b[row].strip()]
    if not told_apart:
        raise InputError(f"{a.name} and {b.name} give the same answer to all of {len(common)} prompts")
    rows = [(*row, answers_a[row], answers_b[row]) for row in told_apart]
    made_from = fingerprint({"a": asdict(a), "b": asdict(b), "rows": rows, "seed": seed, "most": most})
    identity = _secret_id(f"comparison {made_from}")
    order = random.Random(_secret_id(f"order {made_from}"))
    order.shuffle(rows)
    rows = rows[:most]
    # Half and half, not a coin for each: a reviewer who favours a side favours neither model.
    sides: list[Letter] = ["a" if place % 2 else "b" for place in range(len(rows))]
    order.shuffle(sides)
    ids = [_secret_id(f"pair {place} of {made_from}") for place in range(len(rows))]
    pairs = tuple(
        Pair(name, prompt, reference, *((first, second) if side == "a" else (second, first)))
        for name, (prompt, reference, first, second), side in zip(ids, rows, sides, strict=True)
    )
    identical = len(common) - len(told_apart)
    key = Key(
        identity,
        _secret_id(f"token {made_from}"),
        seed,
        a,
        b,
        identical,
        dict(zip(ids, sides, strict=True)),
    )
    return Comparison(key, pairs)


def comparison_folder(identity: str) -> Path:
    """Where the files of a comparison lie."""
    return runs_dir() / "ab" / identity


def write_key(key: Key) -> Path:
    """Keep the key where the tally looks for it; its path."""
    path = comparison_folder(key.comparison) / "key.json"
    write_whole(path, {"format": KEY_FORMAT, **asdict(key)})
    return path


def read_key(identity: str) -> Key | None:
    """The key of a comparison made here; None when there is none."""
    path = comparison_folder(identity) / "key.json"
    if not path.is_file():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored.pop("format", None) != KEY_FORMAT:
        raise InputError(f"{path}: not a key of this version; make the comparison again with 'tunesmith ab'")
    stored["a"], stored["b"] = Contestant(**stored["a"]), Contestant(**stored["b"])
    return Key(**stored)


def write_whole(path: Path, value: Any) -> None:
    """Write JSON by one rename, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
    sync(draft)
    draft.replace(path)


def other(letter: Letter) -> Letter:
    """The opposite of `letter`."""
    return "b" if letter == "a" else "a"


def _secret_id(text: str) -> str:
    """Sixteen hexadecimal digits that only this machine can make from `text`."""
    return hmac.new(_secret(), text.encode(), hashlib.sha256).hexdigest()[:16]


def _secret() -> bytes:
    path = runs_dir() / "ab" / "secret"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(32))
    return path.read_bytes()
