"""Facts of runs as pages: self-contained HTML, and Markdown."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

Curve = Sequence[tuple[int, float]]

BLOCKS = "▁▂▃▄▅▆▇█"


def as_html(facts: Mapping[str, Any]) -> str:
    """The report of a run."""
    template = _environment(autoescape=True).get_template("page.html.jinja")
    return template.render(facts=facts, summary=summary(facts), curve=loss_curve(facts.get("history", {})))


def as_markdown(facts: Mapping[str, Any]) -> str:
    """The same in Markdown, its curve a line of blocks."""
    template = _environment(autoescape=False).get_template("page.md.jinja")
    losses = [loss for _, loss in facts.get("history", {}).get("val_loss", [])]
    text = template.render(facts=facts, summary=summary(facts), curve=blocks(losses))
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def comparison_html(comparison: Mapping[str, Any], all_facts: Sequence[Mapping[str, Any]]) -> str:
    """Several runs on a page: settings that differ, figures that moved, their curves in one picture."""
    template = _environment(autoescape=True).get_template("comparison.html.jinja")
    return template.render(comparison=comparison, all=all_facts, curve=validation_curves(all_facts))


def comparison_markdown(comparison: Mapping[str, Any], all_facts: Sequence[Mapping[str, Any]]) -> str:
    """The same in Markdown."""
    template = _environment(autoescape=False).get_template("comparison.md.jinja")
    text = template.render(comparison=comparison, all=all_facts)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def summary(facts: Mapping[str, Any]) -> list[str]:
    """What came of a run, in a few sentences."""
    run = facts["run"]
    told = [f"{run['model']} on {run['source']}."] if run.get("model") else []
    if cards := facts.get("headline"):
        told.append(
            ". ".join(f"{card['label'][0].upper()}{card['label'][1:]}: {card['value']}" for card in cards)
            + "."
        )
    for line in facts.get("evaluation", {}).get("lines", []):
        if line["name"] == "test_loss" and line.get("change"):
            told.append(f"Test loss {line['base']} → {line['tuned']} ({line['change']}): {line['verdict']}.")
    if facts.get("registration"):
        told.append(f"{facts['registration']}.")
    if run["state"] != "FINISHED":
        told.append(f"The run is {run['state'].lower()}: this is what it has left so far.")
    return told


def loss_curve(history: Mapping[str, Curve]) -> str:
    """Training and validation loss by step, as an SVG element; empty where there is no point."""
    lines: dict[str, tuple[Curve, dict[str, Any]]] = {
        "train_loss": (history.get("train_loss", []), {"alpha": 0.6}),
        "val_loss": (history.get("val_loss", []), {"marker": "o", "linewidth": 2}),
    }
    return _drawn(lines)


def validation_curves(all_facts: Sequence[Mapping[str, Any]]) -> str:
    """The validation losses of several runs in one picture."""
    lines: dict[str, tuple[Curve, dict[str, Any]]] = {}
    for facts in all_facts:
        run = facts["run"]
        name = f"{run['name']} ({run['id'][:8]})".replace("$", r"\$")  # which would begin a formula
        lines[name] = (facts.get("history", {}).get("val_loss", []), {"marker": "o"})
    return _drawn(lines, "validation loss (nats a token)")


def blocks(values: Sequence[float]) -> str:
    """A curve in a line of text."""
    if not values:
        return ""
    low, high = min(values), max(values)
    places = (round((value - low) / ((high - low) or 1) * (len(BLOCKS) - 1)) for value in values)
    return "".join(BLOCKS[place] for place in places)


def _drawn(lines: Mapping[str, tuple[Curve, dict[str, Any]]], label: str = "loss (nats a token)") -> str:
    from matplotlib.figure import Figure

    if not any(points for points, _ in lines.values()):
        return ""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, (points, style) in lines.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :]


def _environment(autoescape: bool) -> Environment:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("tasks.report", "."), autoescape=autoescape, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "size": size, "cell": cell}
    return environment


def number(value: Any, form: str = ",.4g") -> str:
    """A figure as text; nothing for None, text as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:{form}}"


def size(count_bytes: int) -> str:
    """Bytes in a unit that fits."""
    unit, name = next(
        (pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count_bytes >= pair[0]), (1.0, "bytes")
    )
    return f"{count_bytes / unit:.3g} {name}"


def cell(text: Any) -> str:
    """Text within a Markdown table: on one line, without what would end the cell."""
    return " ".join(str(text).split()).replace("|", "\\|")
