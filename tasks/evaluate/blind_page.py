"""The page on which a person compares answers blind: one file, which fetches nothing and sends nothing.

The answers are somebody else's text: they stand in a JSON block and reach the page as text alone, and a
content security policy runs no script but the page's own, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from tasks.evaluate.blind import BEST, CRITERIA, VERDICTS_FORMAT, Comparison
from tasks.prepare.page import printable

LONGEST_COMMENT = 2000
"""Characters."""


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page; nothing in it tells whose an answer is."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("tasks.evaluate", ".")
    environment = Environment(
        loader=loader,
        autoescape=True,  # select_autoescape goes by the name, and leaves "….html.jinja" alone
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["digest"] = _digest
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    page = environment.get_template("blind_page.html.jinja").render(
        comparison=page_data(comparison),
        script=loader.get_source(environment, "blind_page.js")[0],
        style=loader.get_source(environment, "blind_page.css")[0],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def page_data(comparison: Comparison) -> dict[str, Any]:
    """All that the page is told: no names, no runs, no key."""
    return {
        "format": VERDICTS_FORMAT,
        "id": comparison.key.comparison,
        "token": comparison.key.token,
        "criteria": CRITERIA,
        "best": BEST,
        "longest_comment": LONGEST_COMMENT,
        "pairs": [
            {
                "id": pair.id,
                "prompt": printable(pair.prompt),
                "reference": printable(pair.reference),
                "left": printable(pair.left),
                "right": printable(pair.right),
            }
            for pair in comparison.pairs
        ],
    }


def _digest(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
