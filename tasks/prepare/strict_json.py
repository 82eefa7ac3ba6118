"""JSON read strictly: no key twice, no NaN or infinity, no number or nesting that breaks what comes after."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from tasks.prepare.faults import BadRowError, shown

DEEPEST = 64  # a row's tools, the deepest part, are schemas of some ten levels


class StrictJson:
    """Parses JSON text, and holds every reader to the same limits on every version of Python."""

    def __init__(self) -> None:
        self._fault: BadRowError | None = None
        # The hooks remember a fault instead of raising, so that a value's end is known all the same.
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_float=self._float,
            parse_int=self._int,
        )

    def parse(self, text: str) -> Any:
        """The one value a text consists of.

        Raises:
            BadRowError: it is not JSON, or breaks a limit; the first fault of it.
        """
        self._fault = None
        try:
            value = self._decoder.decode(text)
        except json.JSONDecodeError as error:
            raise broken(error, text) from None
        except RecursionError:
            raise too_deep() from None
        if fault := self.fault_of(value, text):
            raise fault
        return value

    def parse_at(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, and where it ends; `fault_of` says what is wrong with it.

        Raises:
            json.JSONDecodeError: no value that ends within the text.
            RecursionError: it is nested too deeply for its end to be found.
        """
        self._fault = None
        return self._decoder.raw_decode(text, start)

    def fault_of(self, value: Any, text: str) -> BadRowError | None:
        """The first fault of the value parsed last; `text` is what it was parsed from."""
        if self._fault is None and text.count("{") + text.count("[") > DEEPEST and _depth(value) > DEEPEST:
            return too_deep()
        return self._fault

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            self._remember("duplicate_key", f"has the key '{shown(twice)}' twice; keep one")
        return keys

    def _constant(self, name: str) -> None:
        self._remember("not_a_number", f"has {name}, which is not JSON; write a string or null")

    def _float(self, digits: str) -> float:
        if math.isinf(value := float(digits)):
            self._remember("not_a_number", f"has {shown(digits)}, which is infinite; write a string or null")
        return value

    def _int(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # over sys.get_int_max_str_digits()
            self._remember("huge_number", f"has an integer of {len(digits)} digits; write it as a string")
            return 0

    def _remember(self, kind: str, detail: str) -> None:
        self._fault = self._fault or BadRowError(kind, detail)


def broken(error: json.JSONDecodeError, text: str) -> BadRowError:
    """The fault of a text that is not JSON."""
    if "\0" in text:
        return BadRowError("nul", "holds NUL bytes, as after a crash or in UTF-16; mend or remove the row")
    what = error.msg.removesuffix(" at")
    return BadRowError("json", f"not JSON at column {error.colno}: {what}; mend or remove the row")


def too_deep() -> BadRowError:
    """The fault of a value nested deeper than `DEEPEST`."""
    return BadRowError("nested", f"nested deeper than {DEEPEST} levels; a row needs no more than a few")


def _depth(value: Any) -> int:
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        inner, depth = waiting.pop()
        if isinstance(inner, dict | list):
            deepest = max(deepest, depth)
            waiting += [(one, depth + 1) for one in (inner.values() if isinstance(inner, dict) else inner)]
    return deepest
