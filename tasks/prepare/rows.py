"""The record every source becomes: one conversation and where it stands in the source."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

Messages = list[dict[str, str]]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """One conversation.

    Attributes:
        line: its line in the source, from 1.
        format: the form it was written in, a key of `formats.FORMATS`.
        messages: its turns, each a `role` of `ROLES` and a `content`.
    """

    line: int
    format: str
    messages: Messages

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the turns, each run of white space taken as one blank: equal for duplicates."""
        turns = [[turn["role"], " ".join(turn["content"].split())] for turn in self.messages]
        return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def hash_share(identity: str, seed: int, purpose: str) -> float:
    """A number in [0, 1), uniform over rows, that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{purpose}\0{seed}\0{identity}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
