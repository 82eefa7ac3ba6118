"""The model card of what is exported: a README.md that the hub can read, made from what the run has left.

It goes where other people read it, so it holds no path of this machine and no address of a store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tasks.config import CREDENTIALS
from tasks.models.origin import CARD_FILE, Origin

TAGS = ("mlx", "tunesmith")

LABELS = {
    "test_loss": "loss (nats a token)",
    "perplexity": "perplexity",
    "chrf": "chrF (0 to 100)",
    "bleu": "BLEU (0 to 100)",
    "exact_match": "exact match",
}
"""Of figures whose name does not say enough."""

OF_THE_MACHINE = ("second", "latency", "memory")
"""In the name of a figure that says more about where it was measured than about the model."""


@dataclass(frozen=True)
class Use:
    """A way to use what is exported, with the code for it."""

    told: str
    language: str
    code: str


@dataclass(frozen=True)
class Subject:
    """What a card is about; whatever is not known is left out of it.

    Attributes:
        title: its heading.
        what: what it is, as "LoRA adapter".
        library: the hub's `library_name`.
        relation: the hub's `base_model_relation`: adapter or finetune.
        base: the base model's name for people; its `origin` names it for the hub, with its licence.
        metrics: figures of the run by MLflow's names: `base/…`, `test/…` and `change/…`.
        data, training: facts by name, in order.
        datasets: of the hub.
    """

    title: str
    what: str
    library: str
    relation: str
    base: str
    origin: Origin
    uses: Sequence[Use]
    metrics: Mapping[str, float] = field(default_factory=dict)
    test_rows: int | None = None
    data: Mapping[str, object] = field(default_factory=dict)
    training: Mapping[str, object] = field(default_factory=dict)
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()


@dataclass(frozen=True)
class Line:
    """A figure of base and tuned, as text."""

    label: str
    base: str
    tuned: str
    change: str


def write_card(folder: Path, subject: Subject) -> None:
    """Write the card into a folder that is exported."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("tasks.export", "."), autoescape=False, keep_trailing_newline=True
    )
    environment.filters["plain"] = plain
    lines = figures(subject.metrics)
    card = environment.get_template("card.md.jinja").render(
        subject=subject,
        front_matter=yaml.safe_dump(front_matter(subject), sort_keys=False, allow_unicode=True),
        figures=lines,
        intervals=any("[" in line.change for line in lines),
        licence=licence_told(subject.origin),
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def front_matter(subject: Subject) -> dict[str, Any]:
    """What the hub reads at the head of a card; keys without a value are left out."""
    known = {
        "base_model": subject.origin.repo,
        "base_model_relation": subject.relation if subject.origin.repo else None,
        "library_name": subject.library,
        "pipeline_tag": "text-generation",
        **subject.origin.licence,
        "datasets": list(subject.datasets),
        "tags": [*TAGS, *subject.tags],
    }
    return {key: value for key, value in known.items() if value}


def figures(metrics: Mapping[str, float]) -> list[Line]:
    """The figures that both models have, without those that say more about the machine."""
    names = [name.removeprefix("test/") for name in metrics if name.startswith("test/")]
    shared = [name for name in names if f"base/{name}" in metrics]
    ordered = sorted(shared, key=lambda name: (list(LABELS).index(name) if name in LABELS else 99, name))
    return [
        Line(
            LABELS.get(name, name.replace("_", " ")),
            f"{metrics[f'base/{name}']:.4g}",
            f"{metrics[f'test/{name}']:.4g}",
            _change(name, metrics),
        )
        for name in ordered
        if not any(word in name for word in OF_THE_MACHINE)
    ]


def plain(value: object) -> str:
    """A value as one line of a table, without credentials, and of a path the last part."""
    text = " ".join(CREDENTIALS.sub("://***@", str(value)).split())
    words = [Path(word).name if Path(word).is_absolute() else word for word in text.split(" ")]
    return " ".join(words).replace("|", "\\|").replace("<", "&lt;")


def licence_told(origin: Origin) -> str:
    """The sentence on the licence: what the base's says, or that it says nothing."""
    stated = origin.licence.get("license_name") or origin.licence.get("license")
    if stated is None:
        return (
            "The files of the base model do not state its licence. Look it up before you pass this on: what "
            "is made from a model is bound to that model's licence."
        )
    return f"That of the base model: {plain(stated)}."


def _change(name: str, metrics: Mapping[str, float]) -> str:
    """Tuned minus base, with its interval where the run has one."""
    change = metrics.get(f"change/{name}", metrics[f"test/{name}"] - metrics[f"base/{name}"])
    ends = [metrics.get(f"change/{name}_{end}") for end in ("low", "high")]
    if None in ends:
        return f"{change:+.3g}"
    return f"{change:+.3g} [{ends[0]:+.3g}, {ends[1]:+.3g}]"
