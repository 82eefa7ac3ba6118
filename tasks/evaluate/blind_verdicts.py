"""A reviewer's verdicts as a file: what the page downloads and the terminal writes, and how it is read back.

    {"format": …, "comparison": …, "reviewer": …, "verdicts": [
      {"pair": …, "choice": "left", "left": {"accuracy": 4}, "right": {}, "comment": ""}], "seal": …}

The seal tells a file that was cut off, edited or made for another page from one that was not. It is no
proof against forgery: what a page can seal, its reader can.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tasks.errors import InputError
from tasks.evaluate.blind import (
    BEST,
    CHOICES,
    CRITERIA,
    VERDICTS_FORMAT,
    Choice,
    Key,
    comparison_folder,
    read_key,
    write_whole,
)

Ratings = Mapping[str, int]
"""From 1 to `BEST` by criterion; criteria that were not rated are missing."""

LARGEST_BYTES = 64_000_000

REVIEWER = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Verdict:
    """What a reviewer says about one pair."""

    pair: str
    choice: Choice
    left: Ratings = field(default_factory=dict)
    right: Ratings = field(default_factory=dict)
    comment: str = ""


@dataclass(frozen=True)
class Verdicts:
    """All that one reviewer says, and the key to it."""

    key: Key
    reviewer: str
    verdicts: tuple[Verdict, ...]

    def write(self, path: Path) -> None:
        """Write the file, sealed."""
        verdicts = [asdict(verdict) for verdict in self.verdicts]
        sealed = _seal(self.key.token, self.reviewer, verdicts)
        write_whole(path, {**_head(self), "verdicts": verdicts, "seal": sealed})


def read_verdicts(path: Path) -> Verdicts:
    """Read a file of verdicts on a comparison that was made here.

    Raises:
        InputError: there is no such file, it is none of verdicts, belongs to a comparison of which this
            machine has no key, or is not as the page wrote it.
    """
    stored = _parsed(path)
    if stored.get("format") != VERDICTS_FORMAT:
        raise InputError(
            f"{path}: no file of verdicts (format {stored.get('format')!r}, expected '{VERDICTS_FORMAT}'); "
            "give the one that the page of 'tunesmith ab' downloads"
        )
    identity, reviewer, verdicts = (stored.get(name) for name in ("comparison", "reviewer", "verdicts"))
    key = read_key(identity) if isinstance(identity, str) and REVIEWER.fullmatch(identity) else None
    if key is None:
        raise InputError(
            f"{path}: is of comparison {identity!r}, of which there is no key in {comparison_folder('…')}; "
            "tally it where 'tunesmith ab' made the page (TUNESMITH_HOME)"
        )
    if not isinstance(reviewer, str) or not REVIEWER.fullmatch(reviewer) or not isinstance(verdicts, list):
        raise _changed(path, "reviewer or verdicts are missing")
    if not hmac.compare_digest(
        str(stored.get("seal")).encode(), _seal(key.token, reviewer, verdicts).encode()
    ):
        raise _changed(path, "the seal does not fit")
    return Verdicts(key, reviewer, tuple(_verdict(path, key, each) for each in _once_each(path, verdicts)))


def _parsed(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes; verdicts have up to {LARGEST_BYTES:,}")
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the one that the page downloaded") from None
    except (IsADirectoryError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); give the file that the page downloaded") from None
    if not isinstance(stored, dict):
        raise InputError(f"{path}: holds a {type(stored).__name__}; give the file that the page downloaded")
    return stored


def _head(verdicts: Verdicts) -> dict[str, str]:
    return {
        "format": VERDICTS_FORMAT,
        "comparison": verdicts.key.comparison,
        "reviewer": verdicts.reviewer,
    }


def _seal(token: str, reviewer: str, verdicts: Sequence[Any]) -> str:
    """As `verdictFile` of blind_page.js: JSON without spaces, keys in the order of the file."""
    text = json.dumps(verdicts, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256("\n".join((token, reviewer, text)).encode("utf-8", "surrogatepass")).hexdigest()


def _once_each(path: Path, verdicts: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
    if not all(isinstance(verdict, dict) for verdict in verdicts):
        raise _changed(path, "a verdict is not an object")
    pairs = [verdict.get("pair") for verdict in verdicts]
    if any(pairs.count(pair) > 1 for pair in pairs):
        raise _changed(path, "a pair is decided twice")
    return verdicts


def _verdict(path: Path, key: Key, stored: Mapping[str, Any]) -> Verdict:
    number = f"pair {stored.get('pair')!r}"
    if stored.get("pair") not in key.left:
        raise _changed(path, f"{number} is not in the comparison")
    if stored.get("choice") not in CHOICES:
        raise _changed(path, f"{number}: choice {stored.get('choice')!r} is none of {', '.join(CHOICES)}")
    for side in ("left", "right"):
        rated = stored.get(side)
        if not isinstance(rated, dict) or not all(map(_is_rating, rated, rated.values())):
            raise _changed(
                path, f"{number}: ratings {rated!r} are not {', '.join(CRITERIA)} from 1 to {BEST}"
            )
    if not isinstance(stored.get("comment"), str) or len(stored) != len(Verdict.__dataclass_fields__):
        raise _changed(path, f"{number} has other keys than a verdict")
    return Verdict(**stored)


def _is_rating(name: str, value: object) -> bool:
    return name in CRITERIA and type(value) is int and 1 <= value <= BEST


def _changed(path: Path, how: str) -> InputError:
    return InputError(f"{path}: is not as the page wrote it ({how}); download the verdicts again")
