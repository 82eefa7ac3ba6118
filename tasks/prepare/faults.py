"""What is wrong with a row, and how its names and values are put into a message."""

from __future__ import annotations

from typing import Any

LONGEST_NAME = 60  # characters of a name shown in a message


class BadRowError(ValueError):
    """A row that cannot be used.

    Attributes:
        kind: a key of `rows.FAULTS`.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def type_name(value: Any) -> str:
    """JSON's word for a value's type, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    known = "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    return names.get(type(value), known)


def shown(name: str) -> str:
    """A name out of the data, safe to print: escaped where it is unprintable, cut where it is long."""
    plain = name if name.isprintable() else ascii(name)[1:-1]
    return plain if len(plain) <= LONGEST_NAME else f"{plain[:LONGEST_NAME]}…"


def listed(names: list[str]) -> str:
    """Names in quotes with commas between them; of many the first ten."""
    more = ", …" if len(names) > 10 else ""
    return ", ".join(f"'{shown(name)}'" for name in names[:10]) + more
