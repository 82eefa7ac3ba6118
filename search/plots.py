"""A study in pictures, as PNG files: they open everywhere, offline too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from search.findings import comparable, parameter_importance
from search.study import GIGABYTE, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS = "validation loss"
DPI = 120


def draw_study(study: Study, folder: Path) -> list[Path]:
    """Draw what there is to see of a study into a folder; the files."""
    drawn = {
        "history": _history(study),
        "rungs": _rungs(study),
        "memory": _memory(study),
        "importance": _importance(study),
        "slice": _slice(study),
        "contour": _contour(study),
    }
    paths = []
    for name, figure in drawn.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=DPI)
    return paths


def _history(study: Study) -> Figure | None:
    """The loss of each trial at the first common rung, and of those trained to the end."""
    points = comparable(study)
    if not points:
        return None
    figure, [axes] = _figure(1)
    axes.plot([trial.number for trial, _ in points], [loss for _, loss in points], "o", label="first rung")
    trained = [trial for trial in study.trials.values() if trial.state == "trained"]
    axes.plot([t.number for t in trained], [t.val_loss for t in trained], "s", label="full length")
    out = [trial.number for trial in study.trials.values() if trial.state in ("over budget", "infeasible")]
    axes.plot(out, [max(loss for _, loss in points)] * len(out), "x", color="grey", label="did not fit")
    axes.set(xlabel="trial", ylabel=LOSS, title=study.name)
    axes.legend()
    return figure


def _rungs(study: Study) -> Figure | None:
    """The curve of each trial, to where it stopped."""
    trials = [trial for trial in study.trials.values() if trial.standing.val_losses]
    if not trials:
        return None
    figure, [axes] = _figure(1)
    best = study.best()
    for trial in trials:
        steps, losses = zip(*trial.standing.val_losses, strict=True)
        is_best = best is not None and trial.number == best.number
        style: dict[str, Any] = {"linewidth": 2.5} if is_best else {"linewidth": 1, "alpha": 0.6}
        label = f"trial {trial.number}, the best" if is_best else None
        axes.plot(steps, losses, marker=".", label=label, **style)
    for rung in sorted({step for trial in trials for step in trial.standing.rung_steps}):
        axes.axvline(rung, color="grey", linewidth=0.5, linestyle=":")
    axes.set(xlabel="updates", ylabel=LOSS, title="rungs")
    if best:
        axes.legend()
    return figure


def _memory(study: Study) -> Figure | None:
    """Predicted against measured peak memory."""
    trials = [trial for trial in study.trials.values() if trial.standing.measured_bytes]
    if not trials:
        return None
    figure, [axes] = _figure(1)
    predicted = [trial.standing.predicted_bytes / GIGABYTE for trial in trials]
    measured = [trial.standing.measured_bytes / GIGABYTE for trial in trials]
    axes.plot(predicted, measured, "o")
    most = max(*predicted, *measured)
    axes.plot([0, most], [0, most], color="grey", linewidth=0.5)
    budget = study.attributes.get("budget_bytes", math.inf) / GIGABYTE
    if budget < 2 * most:
        axes.axhline(budget, color="red", linewidth=0.8, label="budget")
        axes.legend()
    axes.set(xlabel="predicted peak (GB)", ylabel="measured peak (GB)", title="memory")
    return figure


def _importance(study: Study) -> Figure | None:
    shares = parameter_importance(study)
    if not shares:
        return None
    figure, [axes] = _figure(1)
    axes.barh(list(shares)[::-1], list(shares.values())[::-1])
    axes.set(xlabel="share in how the loss varies (PED-ANOVA)", title="importance")
    return figure


def _slice(study: Study) -> Figure | None:
    """The loss over each parameter."""
    points = comparable(study)
    names = list(points[0][0].params) if points else []
    if not names:
        return None
    figure, all_axes = _figure(len(names))
    for axes, name in zip(all_axes, names, strict=True):
        values = [trial.params[name] for trial, _ in points]
        axes.scatter(
            _positions(axes, values, name), [loss for _, loss in points], c=[t.number for t, _ in points]
        )
        axes.set(xlabel=name, ylabel=LOSS if axes is all_axes[0] else "")
    return figure


def _contour(study: Study) -> Figure | None:
    """Learning rate by each other parameter, coloured by the loss."""
    points = comparable(study)
    names = [name for name in (points[0][0].params if points else {}) if name != "learning_rate"]
    if not names or "learning_rate" not in points[0][0].params:
        return None
    figure, all_axes = _figure(len(names))
    for axes, name in zip(all_axes, names, strict=True):
        rates = [trial.params["learning_rate"] for trial, _ in points]
        values = _positions(axes, [trial.params[name] for trial, _ in points], name, vertical=True)
        losses = [loss for _, loss in points]
        x = _positions(axes, rates, "learning_rate")
        if len({*zip(x, values, strict=True)}) >= 4 and len(set(values)) > 1 and len(set(rates)) > 1:
            _fill(axes, x, values, losses)
        drawn = axes.scatter(x, values, c=losses, edgecolors="white", cmap="viridis")
        axes.set(xlabel="learning_rate", ylabel=name)
    figure.colorbar(drawn, ax=all_axes, label=LOSS)
    return figure


def _fill(axes: Axes, x: list[float], y: list[float], losses: list[float]) -> None:
    """The surface between the points; of points in one line there is none."""
    scaled = np.log(x) if axes.get_xscale() == "log" else np.asarray(x)
    if np.linalg.matrix_rank(np.stack([scaled - scaled.mean(), np.asarray(y) - np.mean(y)])) == 2:
        axes.tricontourf(x, y, losses, levels=12, cmap="viridis", alpha=0.5)


def _positions(axes: Axes, values: list[Any], name: str, vertical: bool = False) -> list[float]:
    """Where values stand on an axis: names and lists evenly, learning rates by orders of magnitude."""
    known = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    if name == "learning_rate" and len(known) > 1 and all(value > 0 for value in known):
        axes.set_xscale("log")
        return [float(value) for value in values]
    if len(known) > 8 and not isinstance(known[0], str):
        return [float(value) for value in values]
    ticks, labels = (
        range(len(known)),
        [f"{value:g}" if isinstance(value, float) else str(value) for value in known],
    )
    (axes.set_yticks if vertical else axes.set_xticks)(ticks, labels)
    return [float(known.index(value)) for value in values]


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of its own, without pyplot's list of all figures, on which threads and leaks depend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, 4.2 * columns), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])
