"""The data report for people: a page for a browser, and Markdown for Prefect's artifacts.

The rows are somebody else's text. Nothing of it is read as markup, on the page, in Markdown or, by way of
`printable`, in a terminal; characters that steer instead of showing are made visible.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TEXT_SHOWN = 400
"""Characters of an unused row on the page."""

TICKS = 6


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write the report as one self-contained HTML page: no script, nothing fetched."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tasks.prepare", "."),
        autoescape=True,  # select_autoescape goes by the name, and leaves "….html.jinja" alone
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "number": _number,
        "percent": _percent,
        "printable": printable,
        "place": place,
        "shortened": lambda text: shortened(text, TEXT_SHOWN),
    }
    template = environment.get_template("page.html.jinja")
    path.write_text(template.render(report=report, chart=length_chart(report)), encoding="utf-8")


def report_markdown(report: Mapping[str, Any]) -> str:
    """The report in some twenty lines of Markdown, without the rows' own texts."""
    return "\n".join(_markdown_lines(report)) + "\n"


def printable(text: str) -> str:
    r"""`text` with everything that would steer a terminal or turn the reading direction made visible.

    Control characters become their pictures (escape is ␛), other such characters and halves of surrogate
    pairs �. Line feeds and tabs stay.
    """
    return STEERING.sub(_picture, text)


def shortened(text: str, length: int) -> str:
    """At most `length` characters; what is left out stands as an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def place(where: Mapping[str, Any]) -> str:
    """Where a row or a note stands: `line 7`, of a source of several files `a.jsonl, line 7`."""
    line = f"line {where['line']:,}" if where["line"] else ""
    return printable(", ".join(filter(None, (where["file"], line))))


def length_chart(report: Mapping[str, Any]) -> dict[str, Any]:
    """The histogram of lengths as places on the page, all in percent of the chart's width or height.

    The axis reaches to `max_seq_length` unless that would press the rows into its left half; the line
    is then left out, and `limit_shown` is False.
    """
    lengths = report["length_tokens"]
    edges, rows = lengths["histogram"]["edges"], lengths["histogram"]["rows"]
    limit = report["max_seq_length"]
    limit_shown = limit <= 2 * edges[-1]
    end = max(edges[-1], limit) if limit_shown else edges[-1]
    most = max(max(rows), 1)
    marks = {"median": lengths["median"], "p95": lengths["p95"]} | ({"limit": limit} if limit_shown else {})
    return {
        "bars": [
            {
                "left": 100 * low / end,
                "width": 100 * (high - low) / end,
                "height": 100 * count / most,
                "title": f"{low:,} to {high:,} tokens: {count:,} rows",
            }
            for (low, high), count in zip(itertools.pairwise(edges), rows, strict=True)
        ],
        "marks": {name: 100 * min(value / end, 1) for name, value in marks.items()},
        "ticks": [{"left": 100 * tick / end, "label": f"{tick:,}"} for tick in _ticks(end)],
        "most": most,
        "limit_shown": limit_shown,
    }


STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but line feed and tab, marks of reading direction, halves of surrogate pairs."""


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "�"


def _ticks(end: int) -> Sequence[int]:
    """Round numbers from 0 to at most `end`, `TICKS` of them or fewer."""
    rough = max(end / (TICKS - 1), 1)
    power = 10 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if power == 1 else (1, 2, 2.5, 5, 10)
    step = next(int(factor * power) for factor in factors if factor * power >= rough)
    return range(0, end + 1, step)


def _number(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 or not share else f"{share:.1%}"


def _markdown_lines(report: Mapping[str, Any]) -> Iterator[str]:
    lengths, guidance = report["length_tokens"], report["guidance"]
    yield f"# Data report: {_cell(report['source'])}"
    yield ""
    yield (
        f"**{report['rows_read']:,} rows read = {report['rows_used']:,} used + "
        f"{report['duplicates']:,} duplicates + {report['rejected']:,} rejected.** "
        f"Chat template: {_cell(report['template'])}; learnt: {_cell(report['supervise'])}."
    )
    yield ""
    yield from _markdown_table(
        ("split", "rows", "tokens", "supervised"),
        [
            (name, f"{size['rows']:,}", f"{size['tokens']:,}", _percent(size["supervised_share"]))
            for name, size in report["splits"].items()
        ],
    )
    formats = ", ".join(f"{_cell(name)} {rows:,}" for name, rows in report["formats"].items())
    yield (
        f"Lengths: median {_number(lengths['median'])}, p95 {_number(lengths['p95'])}, longest "
        f"{lengths['max']:,} tokens; the limit is {report['max_seq_length']:,}. Formats: {formats}."
    )
    if guidance["advice"]:
        yield ""
        yield f"**{_cell(guidance['advice'])}**"
    for heading, kinds, key in (("not used", "reasons", "rows"), ("noted", "notes", "count")):
        if report[kinds]:
            yield ""
            yield from _markdown_table(
                (heading, "count", "first"),
                [
                    (_cell(kind["meaning"]), f"{kind[key]:,}", _first(kind["first"]))
                    for kind in report[kinds].values()
                ],
            )


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _first(places: Sequence[Mapping[str, Any]]) -> str:
    return _cell(": ".join(filter(None, (place(places[0]), places[0]["detail"])))) if places else ""


def _cell(text: str) -> str:
    """Text on one line in which Markdown and HTML find nothing of theirs."""
    flat = shortened(" ".join(printable(text).split()), TEXT_SHOWN)
    return re.sub(r"([\\`*_{}\[\]()#!|~])", r"\\\1", flat).replace("&", "&amp;").replace("<", "&lt;")
