"""The charts that MLflow's UI shows of our runs: loss curves first, then the settings of trials beside them.

MLflow keeps a shared view of an experiment in one of its tags, as the JSON of its UI's own state (3.17), and
shows it where an address names the view. Charts of all other metrics follow below, as MLflow makes them.
"""

from __future__ import annotations

import json
from typing import Any

VIEW = "tunesmith"

VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
"""Of the experiment."""

CURVES = ("val_loss", "train_loss")
SETTINGS = ("train.learning_rate", "train.rank", "train.num_layers")
RESULT = "best_val_loss"


def view() -> str:
    """The tag's value: runs by their best validation loss, those of a search not under their parent."""
    charts = [_chart("LINE", "loss", name, metricKey=name, selectedMetricKeys=[name]) for name in CURVES]
    charts.append(
        _chart(
            "PARALLEL",
            "settings",
            "settings",
            selectedParams=list(SETTINGS),
            selectedMetrics=[RESULT],
            showAllRuns=True,
        )
    )
    state = {
        "orderByKey": f"metrics.`{RESULT}`",
        "orderByAsc": True,
        "runsHiddenMode": "FIRST_20_RUNS",
        "hideEmptyCharts": True,
        "isAccordionReordered": True,
        "compareRunSections": [_section("loss", "Loss", 2), _section("settings", "Settings", 1)],
        "compareRunCharts": charts,
    }
    return json.dumps(state)


def address_of_view(server: str, experiment_id: str) -> str:
    """Where a server of MLflow's pages shows the view."""
    page = f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs"
    return f"{page}?compareRunsMode=CHART&viewStateShareKey={VIEW}"


def _section(key: str, name: str, columns: int) -> dict[str, Any]:
    plain = {"display": True, "isReordered": True, "deleted": False, "isGenerated": False}
    return {"uuid": f"{VIEW}-{key}", "name": name, "columns": columns, "cardHeight": 360, **plain}


def _chart(kind: str, section: str, title: str, **more: Any) -> dict[str, Any]:
    return {
        "uuid": f"{VIEW}-{title}",
        "type": kind,
        "metricSectionId": f"{VIEW}-{section}",
        "displayName": title,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
        **(_LINE if kind == "LINE" else {}),
        **more,
    }


_LINE: dict[str, Any] = {
    "xAxisKey": "step",
    "yAxisKey": "metric",
    "scaleType": "linear",
    "xAxisScaleType": "linear",
    "lineSmoothness": 0,
    "yAxisExpressions": [],
    "range": {},
    "useGlobalXaxisKey": True,
    "useGlobalLineSmoothing": True,
}
"""What MLflow's own line charts begin with."""
