"""What a report says, as plain values: written once at the end of a run, rendered whenever somebody asks.

A section that a run has nothing for is missing, and its heading with it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.config import changed, flatten
from tasks.evaluate.side_by_side import worst_and_best
from tasks.evaluate.summary import evaluation_lines
from tasks.report.finished import Finished
from tasks.report.progression import progression
from tasks.report.suggestions import suggestions
from tasks.train.step import TRAINING_FILE

CURVE_POINTS = 1000
"""Of a curve in the facts: more than a page can show."""

Facts = dict[str, Any]


def facts_of(finished: Finished) -> Facts:
    """Everything the report of a finished run says."""
    training = finished.adapter.read_json(TRAINING_FILE)
    data = finished.data.read_json("report.json")
    figures = finished.evaluation.figures()
    lines = evaluation_lines(figures, finished.evaluation.changes())
    tuned = figures["tuned"]
    evaluation: dict[str, Any] = {
        "lines": [{**vars(line), "verdict": line.verdict} for line in lines],
        "rows": len(tuned["rows"]),
        "answers": len(tuned.get("answers", [])),
        "general": len(tuned["general"]["rows"]) if "general" in tuned else 0,
    }
    facts: Facts = {
        "run": {
            "name": finished.name,
            "id": finished.run.id,
            "state": "FINISHED",
            "written": time.strftime("%Y-%m-%d %H:%M"),
            "model": finished.model.name,
            "source": data["source"],
        },
        "headline": headline(training, evaluation["lines"]),
        "registration": _registration(finished),
        "data": data_facts(data, finished.data.fingerprint),
        "settings": flatten(finished.settings),
        "changed": sorted(changed(finished.settings)),
        "training": {key: value for key, value in training.items() if key not in ("history", "inputs")},
        "progression": progression(training["history"]),
        "history": thinned(training["history"]),
        "evaluation": evaluation,
        "samples": _samples(figures),
        "steps": [vars(step) for step in finished.steps()],
        "resources": resources(training),
        "files": _files(finished),
        "environment": environment(),
    }
    facts["suggestions"] = suggestions(facts, data)
    return facts


def headline(training: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The figures that a person looks for first, with what they are."""
    before, best = training["val_loss_before"], training["best_val_loss"]
    cards = [{"value": f"{before:.3f} → {best:.3f}", "label": f"validation loss, {best / before - 1:+.0%}"}]
    for line in lines:
        if line["name"] in ("perplexity", "chrf"):
            told = f"{line['label']} on the test rows, base → tuned"
            cards.append({"value": f"{line['base']} → {line['tuned']}", "label": told})
    cards.append({"value": _minutes(training["seconds"]), "label": "training, validation included"})
    cards.append({"value": f"{training['peak_memory']:.2f} GB", "label": "peak memory (MLX)"})
    return cards


def data_facts(data: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """Of the data report, what belongs beside a run."""
    told = {
        "source": data["source"],
        "rows read": data.get("rows_read"),
        "rows used": data.get("rows_used"),
        "duplicates": data.get("duplicates"),
        "rejected": data.get("rejected"),
        "split by": data.get("split_by"),
        "template": data.get("template"),
        "longest row (tokens)": data.get("length_tokens", {}).get("max"),
        "fingerprint": fingerprint,
    }
    known = {name: value for name, value in told.items() if value is not None}
    return {"facts": known, "splits": data.get("splits", {})}


def resources(training: Mapping[str, Any]) -> dict[str, str]:
    """What the training took."""
    seconds = max(training["seconds"], 1e-9)
    return {
        "training time": _minutes(training["seconds"]),
        "supervised tokens": f"{training['trained_tokens']:,}",
        "tokens a second, validation included": f"{training['trained_tokens'] / seconds:,.0f}",
        "trainable parameters": f"{training['trainable_parameters']:,}",
        "peak memory (MLX)": f"{training['peak_memory']:.2f} GB",
    }


def environment() -> dict[str, str]:
    """What the run was made with, and on."""
    from importlib.metadata import version

    import psutil

    from tasks.models.device import device_name

    packages = ("mlx", "mlx-lm", "mlflow", "prefect", "optuna")
    return {
        "device": device_name(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": str(psutil.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "Python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def thinned(history: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, list[tuple[int, float]]]:
    """The loss curves: every validation, and of the training losses as many as a page can show."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for name in ("train_loss", "val_loss"):
        points = [(step, metrics[name]) for step, metrics in history if name in metrics]
        every = max(1, len(points) // CURVE_POINTS) if name == "train_loss" else 1
        curves[name] = points[::every]
    return curves


def samples(answers: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Which answers are shown under which heading: the worst and the best by chrF."""
    worst, best = worst_and_best(answers)
    return {"The worst answers": worst, "The best answers": best}


def _samples(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    base, tuned = figures["base"].get("answers", []), figures["tuned"].get("answers", [])
    return {
        title: [
            {
                "prompt": tuned[place]["prompt"],
                "reference": tuned[place]["reference"],
                "base": base[place]["answer"],
                "base_chrf": base[place]["chrf"],
                "tuned": tuned[place]["answer"],
                "tuned_chrf": tuned[place]["chrf"],
            }
            for place in places
        ]
        for title, places in samples(tuned).items()
        if places
    }


def _registration(finished: Finished) -> str | None:
    told = finished.registration
    if told is None:
        return None
    alias = "@champion" if told.champion else "@challenger"
    return f"{told.name} version {told.version} is {alias}: {told.reason}"


def _files(finished: Finished) -> list[dict[str, Any]]:
    places = {
        "adapter": finished.adapter.path,
        "base model": finished.model.path,
        "prepared data": finished.data.path,
        "fused model": finished.fused.path if finished.fused else None,
    }
    return [
        {"what": what, "path": str(path), "bytes": _size_bytes(path)}
        for what, path in places.items()
        if path is not None
    ]


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
