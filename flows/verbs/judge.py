"""Judge: which of two runs answers better, by people, by a model, by the field's benchmarks."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from flows.verbs.frame import LOOK, Overrides, advised_screen, app, load, quiet_prefect, quiet_screen

if TYPE_CHECKING:
    from tasks.config import Settings, TrackingSettings
    from tasks.evaluate.blind import Comparison


@app.command(group=LOOK)
def ab(
    run_a: str | None = None,
    run_b: str | None = None,
    overrides: Overrides | None = None,
    /,
    *,
    seed: int = 0,
    prompts: int | None = None,
    out: Path | None = None,
    terminal: Annotated[bool, Parameter(negative=())] = False,
    judge: str | None = None,
    judge_model: str | None = None,
    tally: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Compare the answers of two runs blind: on a page, in the terminal, or by a model as judge.

    Parameters
    ----------
    run_a
        an MLflow run: its id, the beginning of its id, or its name
    run_b
        another run, or 'base' for the base model of the first
    seed
        of the prompts' order and of who is on the left
    prompts
        compare so many, drawn by the seed; all by default
    out
        write the page to this .html file
    terminal
        decide here, with the page's keys
    judge
        have a model decide, at this OpenAI-compatible address (evaluate.judge.url)
    judge_model
        its name there (evaluate.judge.model)
    tally
        count this file of verdicts, and log the figures to both runs
    as_json
        print the figures of --tally or --judge as JSON, and nothing else
    """
    quiet_prefect()
    from tasks.errors import InputError

    given = [f"evaluate.judge.url={json.dumps(judge)}"] if judge is not None else []
    given += [f"evaluate.judge.model={json.dumps(judge_model)}"] if judge_model is not None else []
    settings = load(None, [*(overrides or []), *given])
    judged = settings.evaluate.judge.url is not None
    ways = {"--tally": tally is not None, "--terminal": terminal, "--judge": judged, "--out": out is not None}
    chosen = [way for way, taken in ways.items() if taken]
    if len(chosen) > 1:
        raise InputError(f"{' and '.join(chosen)} do not go together; give one of them")
    if as_json and not (judged or tally):
        raise InputError("--json prints the figures of --tally or --judge; give one of them")
    if tally is not None:
        if run_a is not None:
            raise InputError(f"'{run_a}': --tally needs no runs, the file knows them")
        _tally(tally, settings.tracking, as_json)
        return
    if run_a is None or run_b is None:
        raise InputError("give two runs, or a run and 'base', or --tally FILE")
    from flows.blind import make_comparison

    with quiet_screen():
        comparison = make_comparison(run_a, run_b, settings.tracking, seed, prompts)
    if judged:
        _judge(comparison, settings, as_json)
    elif terminal:
        _decide_here(comparison)
    else:
        _page(comparison, out)


@app.command(group=LOOK)
def harness(
    run: str,
    /,
    *,
    tasks: Annotated[list[str], Parameter(consume_multiple=True)],
    limit: int | None = None,
    shots: int | None = None,
) -> None:
    """Score base and tuned model with the lm-evaluation-harness (pip install 'tunesmith[harness]').

    Parameters
    ----------
    run
        an MLflow run: its id, the beginning of its id, or its name
    tasks
        names as 'lm_eval ls tasks' lists them, for example arc_easy, or YAML files of tasks
    limit
        use so many questions a task, for a quick look; figures of fewer questions compare with nothing else
    shots
        worked examples before each question; by default what the task says
    """
    quiet_prefect()
    from flows.harness import run_harness
    from flows.harness_table import print_scores

    settings = load(None, [])
    with advised_screen(quiet=True):
        scores = run_harness(run, settings.tracking, tasks, limit, shots)
    print_scores(Console(), scores)


def _page(comparison: Comparison, out: Path | None) -> None:
    from flows.blind import make_page
    from flows.tables import print_commands, print_places

    path = make_page(comparison, out)
    console = Console()
    print_places(console, {"page": str(path), "prompts": str(len(comparison.pairs))})
    print_commands(
        console,
        {"decide": "open the page in a browser; ← → ↓ decide", "tally": "tunesmith ab --tally FILE"},
    )


def _decide_here(comparison: Comparison) -> None:
    from flows.blind_terminal import judge_at_terminal
    from flows.tables import print_commands

    console = Console()
    path, decided = judge_at_terminal(comparison, console)
    console.print(f"\n{decided} of {len(comparison.pairs)} decided, kept in {path}", soft_wrap=True)
    if decided:
        print_commands(console, {"tally": f"tunesmith ab --tally {shlex.quote(str(path))}"})


def _tally(path: Path, tracking: TrackingSettings, as_json: bool) -> None:
    from flows.blind import tally_file
    from flows.blind_tables import print_tally, tally_as_json

    with quiet_screen():
        counted = tally_file(path, tracking)
    if as_json:
        print(json.dumps(tally_as_json(counted), indent=2))
    else:
        print_tally(Console(), counted)


def _judge(comparison: Comparison, settings: Settings, as_json: bool) -> None:
    from flows.blind import judge
    from flows.blind_tables import judgement_as_json, print_judgement, print_tally, tally_as_json
    from flows.tables import print_places

    with quiet_screen():
        judgement, counted, path = judge(comparison, settings.evaluate.judge, settings.tracking)
    if as_json:
        print(json.dumps(tally_as_json(counted) | judgement_as_json(judgement), indent=2))
        return
    console = Console()
    print_tally(console, counted)
    print_judgement(console, judgement)
    print_places(console, {"opinions": str(path)})
