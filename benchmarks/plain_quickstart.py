"""The quickstart's steps in order as plain functions in one MLflow run; Prefect is not imported.

python benchmarks/plain_quickstart.py     # after `tunesmith quickstart` in the same home: all is reused
"""

from __future__ import annotations

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

from bare_steps import without_prefect  # noqa: E402

import tasks  # noqa: E402, F401  (sets the process up before MLX is imported)

without_prefect(("models", "prepare", "train", "evaluate", "fuse", "register", "report"))


def main() -> None:
    """Run them all."""
    from tasks.config import load_settings
    from tasks.evaluate.side_by_side import evaluate_adapter
    from tasks.fuse.merge import fuse_adapter
    from tasks.models.resolve import resolve_model
    from tasks.prepare.pipeline import prepare_data
    from tasks.register.registry import Candidate, register_adapter
    from tasks.report.finished import Finished
    from tasks.report.write import write_report
    from tasks.system_metrics import system_metrics
    from tasks.tracking import mlflow_run
    from tasks.train.step import train_adapter

    settings = load_settings(CHECKOUT / "flows" / "configs" / "quickstart.yaml")
    with mlflow_run(settings, "plain", {}) as run, system_metrics(run, run.started_ms()):
        model = resolve_model(settings.model)
        data = prepare_data(settings.data, model, run)
        adapter = train_adapter(settings.train, model, data, run)
        evaluation = evaluate_adapter(settings.evaluate, model, adapter, data, run, settings.train)
        fused = fuse_adapter(settings.fuse, model, adapter, data)
        candidate = Candidate(model, adapter, data, evaluation)
        registration = register_adapter(settings, "plain", candidate, run)
        write_report(Finished("plain", settings, model, data, adapter, evaluation, fused, registration, run))
    assert "prefect" not in sys.modules


if __name__ == "__main__":
    main()
