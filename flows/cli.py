"""The `tunesmith` command: one word a verb, each a thin view of a flow or a function.

Exit codes: 0 done, 1 failed, 2 wrong input, 130/143 stopped and resumable. Nothing heavy is imported before a
verb needs it: `tunesmith --help` answers at once.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, CycloptsError, Group, Parameter
from rich.console import Console

if TYPE_CHECKING:
    from flows.display import Screen
    from tasks.config import Settings

CONFIGS = Path(__file__).parent / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"

START = Group.create_ordered("Start")
DATA = Group.create_ordered("Data")
TRAIN = Group.create_ordered("Train")
LOOK = Group.create_ordered("Look")
OPERATE = Group.create_ordered("Operate")

app = App(
    name="tunesmith",
    help="Fine-tune language models with MLX on the machine in front of you, and remember everything.",
    help_epilogue="Settings are given as section.key=value after the file; 'tunesmith show' lists them. "
    "--debug shows the traceback of an error.",
    version_flags=["--version"],
)

Config = Annotated[Path, Parameter(help="a YAML file of settings")]
Data = Annotated[str, Parameter(help="what data.source takes: a file, a folder, a hub dataset, 'stdlib'")]
Overrides = Annotated[list[str], Parameter(help="settings laid over the file: section.key=value")]


def main() -> None:
    """Run the command line and exit with its code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(run(arguments, debug="--debug" in sys.argv[1:]))


def run(arguments: list[str], debug: bool = False) -> int:
    """Run one command; its exit code. With `debug`, exceptions are raised instead of explained."""
    from tasks.errors import InputError, StepError

    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(arguments, exit_on_error=False, result_action="return_none")
    except CycloptsError:
        return 2
    except KeyboardInterrupt:
        return _explain("stopped; what was finished is kept, and the same command goes on from there", 130)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except (InputError, StepError) as error:
        if debug:
            raise
        return _explain(str(error), 2 if isinstance(error, InputError) else 1)
    except Exception as error:
        if debug:
            raise
        message = str(error).strip().split("\n")[0]
        return _explain(f"{type(error).__name__}: {message} (--debug shows where)", 1)
    return 0


@app.command(group=START)
def quickstart(overrides: Overrides | None = None, /) -> None:
    """Fine-tune the bundled 135M model on the standard library's docstrings: the whole road in minutes."""
    finetune(QUICKSTART, overrides)


@app.command(group=START)
def doctor(config: Config | None = None, /) -> None:
    """Check that everything works here: Python, MLX, memory, disk, MLflow, Prefect, data, a trial step."""
    from flows.doctor import diagnose
    from flows.prefect_environment import prepare_prefect
    from flows.tables import print_check

    settings = _load(config or QUICKSTART, [])
    prepare_prefect(quiet=True)
    with _screen(quiet=True) as shown:
        checks = []
        for check in diagnose(settings):
            print_check(shown.console, check)
            checks.append(check)
    failed = sum(check.ok is False for check in checks)
    if failed:
        sys.exit(_explain(f"{failed} of {len(checks)} checks failed", 1))


@app.command(group=START)
def show(config: Config | None = None, overrides: Overrides | None = None, /) -> None:
    """Print the resolved settings; those that are not the defaults are marked with where they come from."""
    from flows.tables import print_settings

    print_settings(Console(), _load(config, overrides), overrides or [])


@app.command(group=DATA)
def inspect(
    data: Data,
    overrides: Overrides | None = None,
    /,
    *,
    model: str | None = None,
    html: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Look at rows before they are used: what is wrong with which, lengths, splits, what will be learnt.

    Parameters
    ----------
    model
        for whose tokenizer and chat template (model.source)
    html
        write the report as a page to this file
    as_json
        print the report as JSON, and nothing else
    """
    _quiet_prefect()
    from flows.data import check_page, data_settings, prepare_command
    from flows.data import inspect as look
    from flows.tables import SAMPLES, print_commands, print_data_report
    from tasks.prepare.page import write_page

    settings = data_settings(data, model, overrides or [])
    if html is not None:
        check_page(html)
    _check(settings)
    with _waits():
        report = look(settings)
    if html is not None:
        write_page(report, html)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    console = Console()
    print_data_report(console, report, settings.train.batch_size, SAMPLES)
    print_commands(console, {"next": prepare_command(data, model, overrides or [], report)})


@app.command(group=DATA)
def prepare(
    data: Data,
    overrides: Overrides | None = None,
    /,
    *,
    model: str | None = None,
    out: Path | None = None,
) -> None:
    """Make rows ready for training: checked, split, tokenised; mlx_lm.lora --data takes the folder too.

    Parameters
    ----------
    model
        for whose tokenizer and chat template (model.source)
    out
        put a copy here, in a new folder or in place of an earlier one
    """
    _quiet_prefect()
    from flows.data import PAGE_FILE, data_settings, finetune_command
    from flows.data import prepare as make
    from flows.tables import print_commands, print_data_report, print_places

    settings = data_settings(data, model, overrides or [])
    _check(settings)
    with _waits():
        output, folder = make(settings, out)
    console = Console()
    print_data_report(console, output.read_json("report.json"), settings.train.batch_size)
    unchanged = "  (nothing has changed, so it was there already)" if output.reused else ""
    print_places(console, {"prepared": f"{folder}{unchanged}", "page": str(folder / PAGE_FILE)})
    print_commands(console, {"next": finetune_command(settings, QUICKSTART, overrides or [])})


@app.command(name="finetune", group=TRAIN)
def finetune(config: Config, overrides: Overrides | None = None, /) -> None:
    """Prepare, train, evaluate, fuse, register, report: one fine-tune as CONFIG says."""
    _finetune(_load(config, overrides))


@app.command(group=TRAIN)
def resume(run: str, /) -> None:
    """Go on with a finetune that was stopped, killed or failed, in its own MLflow run.

    Parameters
    ----------
    run: the MLflow run: its id, the beginning of its id, or its name
    """
    from flows.prefect_environment import prepare_prefect
    from flows.resume import find_interrupted

    prepare_prefect(quiet=True)
    interrupted = find_interrupted(run)
    _finetune(interrupted.settings, interrupted.run_id)


@app.command(group=TRAIN)
def search(
    config: Config,
    overrides: Overrides | None = None,
    /,
    *,
    trials: int | None = None,
    budget: str | None = None,
) -> None:
    """Search learning rate, rank and number of layers within a memory budget.

    Parameters
    ----------
    trials
        how many to train (search.trials)
    budget
        memory for one trial: 8GB, or 75% of what is free (search.budget)
    """
    given = [f"search.trials={trials}"] if trials is not None else []
    given += [f"search.budget={budget}"] if budget is not None else []
    settings = _load(config, [*(overrides or []), *given])
    _check_budget(settings)
    with _screen() as shown:
        with _prefect(settings):
            from flows.hypersearch import hypersearch
        outcome = hypersearch(settings)
    from flows.tables import print_search

    print_search(shown.console, outcome, config)


@app.command(group=LOOK)
def ui(config: Config | None = None, /, *, port: int = 5000) -> None:
    """Open the MLflow UI on this machine: runs, curves, comparisons, registered models."""
    from flows.ui import open_ui
    from tasks.tracking import send_leftovers, tracking_uri

    uri = tracking_uri(_load(config, []).tracking)
    with _screen():
        send_leftovers(uri)
        open_ui(port, uri)


@app.command(group=OPERATE)
def schedule(
    config: Config,
    overrides: Overrides | None = None,
    /,
    *,
    cron: str,
    timezone: str | None = None,
) -> None:
    """Fine-tune again and again, served by Prefect until it is stopped.

    Parameters
    ----------
    cron
        when, for example "0 2 * * *" for two o'clock every night
    timezone
        of the cron expression, for example Europe/Berlin; this machine's by default
    """
    from flows.deploy import schedule as serve
    from flows.prefect_environment import prepare_prefect

    settings = _load(config, overrides)
    with _screen():
        prepare_prefect(quiet=False)
        _check(settings)
        serve(settings, config.stem, cron, timezone)


@app.command(group=OPERATE)
def up(*, port: int = 4200) -> None:
    """Keep a local Prefect server running: flows then start sooner, and its UI shows every run."""
    from flows.server import up as start

    with _screen() as shown:
        state = start(port)
    shown.line(f"Prefect is up: {state.url}   ('tunesmith down' ends it)")


@app.command(group=OPERATE)
def down() -> None:
    """End the local Prefect server."""
    from flows.server import down as stop

    with _screen() as shown:
        shown.line("Prefect is down" if stop() else "no local Prefect server was running")


def _finetune(settings: Settings, resumed: str | None = None) -> None:
    started = time.perf_counter()
    with _screen() as shown:
        with _prefect(settings):
            from flows.finetune import finetune as flow
        outcome = flow(settings, resumed)
    from flows.tables import print_outcome

    print_outcome(shown.console, outcome, time.perf_counter() - started)


def _load(config: Path | None, overrides: list[str] | None) -> Settings:
    from tasks.config import load_settings

    return load_settings(config, overrides or [])


def _check(settings: Settings) -> None:
    """Find the faults that can be known before anything is started."""
    from tasks.models.resolve import check_model
    from tasks.prepare.sources import check_source

    check_source(settings.data)
    check_model(settings.model)


def _check_budget(settings: Settings) -> None:
    from search.budget import parse_budget

    parse_budget(settings.search.budget, free_bytes=1)


@contextmanager
def _screen(quiet: bool = False) -> Iterator[Screen]:
    """Progress of the block on the terminal, and its messages, or with `quiet` its warnings only."""
    from flows.display import screen
    from tasks.process import blas_advice

    with screen(quiet) as shown:
        if advice := blas_advice():
            shown.line(f"[yellow]{advice}")
        yield shown


def _quiet_prefect() -> None:
    """For verbs that need no Prefect: the steps import it, and it would print their log lines."""
    from flows.prefect_environment import prepare_prefect

    prepare_prefect(quiet=True)


@contextmanager
def _waits() -> Iterator[None]:
    """Progress and warnings of the block, for work that needs no MLX and so no advice about it."""
    from flows.display import screen

    with screen(quiet=True):
        yield


@contextmanager
def _prefect(settings: Settings) -> Iterator[None]:
    """Import a flow in this block; faulty settings are refused before a Prefect server is woken."""
    from flows.prefect_environment import prepare_prefect, wake_server
    from tasks.progress import progress

    found = prepare_prefect(quiet=True)
    with progress("starting Prefect" if found else "starting Prefect (sooner after 'tunesmith up')"):
        yield
        _check(settings)
        wake_server()


def _explain(message: str, code: int) -> int:
    Console(stderr=True, style="red" if code in (1, 2) else "yellow").print(
        f"tunesmith: {message}", highlight=False, markup=False, soft_wrap=True
    )
    return code


def _terminate(number: int, frame: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
