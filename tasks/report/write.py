"""Write the report of a run: HTML and Markdown under `mlruns/reports/`, and with the facts into the run."""

from __future__ import annotations

from pathlib import Path

from tasks.home import runs_dir
from tasks.publish import write_json
from tasks.report.facts import Facts, facts_of
from tasks.report.finished import Finished
from tasks.report.page import as_html, as_markdown, summary

FACTS_FILE = "facts.json"
"""Beside the pages in the run's artifacts, under `report`."""

NOTE = "mlflow.note.content"
"""The tag that MLflow shows as a run's description."""


def write_report(finished: Finished) -> Path:
    """Write both pages, log them and their facts to the run, describe the run by their summary.

    Returns:
        The HTML page.
    """
    facts = facts_of(finished)
    html, markdown = write_pages(facts)
    client, run_id = finished.run.client, finished.run.id
    kept = html.with_name(FACTS_FILE)
    write_json(kept, facts)
    for path in (html, markdown, kept):
        client.log_artifact(run_id, str(path), "report")
    kept.unlink()
    finished.run.set_tags({NOTE: "\n\n".join(summary(facts))})
    return html


def write_pages(facts: Facts, folder: Path | None = None) -> tuple[Path, Path]:
    """The pages of a run's facts, HTML and Markdown, by its id."""
    folder = folder or runs_dir() / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    html = folder / f"{facts['run']['id']}.html"
    markdown = html.with_suffix(".md")
    html.write_text(as_html(facts), encoding="utf-8")
    markdown.write_text(as_markdown(facts), encoding="utf-8")
    return html, markdown
