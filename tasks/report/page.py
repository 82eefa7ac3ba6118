"""One self-contained HTML page a run: data, settings, loss curve, figures and samples."""

from __future__ import annotations

import io
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.config import Settings, changed, flatten
from tasks.evaluate.side_by_side import Evaluation, worst_and_best
from tasks.evaluate.summary import evaluation_lines
from tasks.home import runs_dir
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput
from tasks.register.registry import Registration
from tasks.tracking import Run
from tasks.train.step import TRAINING_FILE


@dataclass(frozen=True)
class StepDone:
    """What became of a step in a run: its output was there already, or was made and `why`."""

    name: str
    reused: bool
    seconds: float
    why: str


@dataclass(frozen=True)
class Finished:
    """Everything a finished run has to tell.

    `fused` and `registration` are None when their sections are disabled.
    """

    name: str
    settings: Settings
    model: ModelFolder
    data: StepOutput
    adapter: StepOutput
    evaluation: Evaluation
    fused: StepOutput | None
    registration: Registration | None
    run: Run

    def reused(self) -> list[str]:
        """The steps that found their output already made."""
        return [step.name for step in self.steps() if step.reused]

    def steps(self) -> list[StepDone]:
        """Every step of the run in its order, with why it was done."""
        outputs: dict[str, StepOutput | Evaluation] = {
            "prepare": self.data,
            "train": self.adapter,
            "evaluate": self.evaluation,
        }
        if self.fused is not None:
            outputs["fuse"] = self.fused
        done = [StepDone(name, made.reused, made.seconds, made.why) for name, made in outputs.items()]
        if told := self.registration:
            done.append(StepDone("register", told.reused, 0.0, "" if told.reused else "a new version"))
        return done


def write_report(finished: Finished) -> Path:
    """Write the page under `mlruns/reports/`, log it to the run as an artifact, return its path."""
    from jinja2 import Environment, PackageLoader

    training = finished.adapter.read_json(TRAINING_FILE)
    figures = finished.evaluation.figures()
    environment = Environment(loader=PackageLoader("tasks.report", "."), autoescape=True)
    environment.filters["number"] = lambda value: (
        f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
    )
    page = environment.get_template("page.html.jinja").render(
        finished=finished,
        data=finished.data.read_json("report.json"),
        training=training,
        figures=figures,
        evaluation=evaluation_lines(figures, finished.evaluation.changes()),
        samples=_samples(figures["tuned"].get("answers", [])),
        curve=loss_curve(training["history"]),
        settings=flatten(finished.settings),
        changed=changed(finished.settings),
        versions=versions(),
    )
    folder = runs_dir() / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{finished.run.id}.html"
    path.write_text(page, encoding="utf-8")
    finished.run.client.log_artifact(finished.run.id, str(path), "report")
    return path


def _samples(answers: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Which answers are shown under which heading: the worst and the best by chrF."""
    worst, best = worst_and_best(answers)
    return {"The worst answers": worst, "The best answers": best}


def loss_curve(history: Sequence[tuple[int, dict[str, float]]]) -> str:
    """Training and validation loss by step, as an SVG element."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, style in (("train_loss", {"alpha": 0.6}), ("val_loss", {"marker": "o", "linewidth": 2})):
        points = [(step, metrics[name]) for step, metrics in history if name in metrics]
        axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :]


def versions() -> dict[str, Any]:
    """What the run was made with."""
    from importlib.metadata import version

    from tasks.models.device import device_name

    packages = {name: version(name) for name in ("mlx", "mlx-lm", "mlflow", "prefect")}
    system = f"{platform.system()} {platform.machine()}"
    return {"device": device_name(), "system": system, "python": platform.python_version(), **packages}
