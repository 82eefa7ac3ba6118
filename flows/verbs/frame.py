"""What the verbs of the `tunesmith` command share: the app, its groups, its arguments, its screen.

Nothing heavy is imported before a verb needs it: `tunesmith --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Group, Parameter
from rich.console import Console

if TYPE_CHECKING:
    from flows.display import Screen
    from tasks.config import Settings

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"

START = Group.create_ordered("Start")
DATA = Group.create_ordered("Data")
TRAIN = Group.create_ordered("Train")
LOOK = Group.create_ordered("Look")
SHIP = Group.create_ordered("Ship")
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


def load(config: Path | None, overrides: list[str] | None) -> Settings:
    """The settings of a file with overrides laid over it."""
    from tasks.config import load_settings

    return load_settings(config, overrides or [])


def check(settings: Settings) -> None:
    """Find the faults that can be known before anything is started."""
    from tasks.evaluate.custom_metrics import load_metrics
    from tasks.models.resolve import check_model
    from tasks.prepare.sources import check_source

    check_source(settings.data)
    check_model(settings.model)
    load_metrics(settings.evaluate.metrics)
    if settings.train.from_adapter:
        from tasks.train.starting_point import check_starting_point

        check_starting_point(settings.train)


@contextmanager
def advised_screen(quiet: bool = False) -> Iterator[Screen]:
    """Progress of the block on the terminal, and its messages, or with `quiet` its warnings only."""
    from flows.display import screen
    from tasks.process import blas_advice

    with screen(quiet) as shown:
        if advice := blas_advice():
            shown.line(f"[yellow]{advice}")
        yield shown


def quiet_prefect() -> None:
    """For verbs that need no Prefect: the steps import it, and it would print their log lines."""
    from flows.prefect_environment import prepare_prefect

    prepare_prefect(quiet=True)


@contextmanager
def quiet_screen() -> Iterator[None]:
    """Progress and warnings of the block, for work that needs no MLX and so no advice about it."""
    from flows.display import screen

    with screen(quiet=True):
        yield


@contextmanager
def prefect_ready(settings: Settings) -> Iterator[None]:
    """Import a flow in this block; faulty settings are refused before a Prefect server is woken."""
    from flows.prefect_environment import prepare_prefect, wake_server
    from tasks.progress import progress

    found = prepare_prefect(quiet=True)
    with progress("starting Prefect" if found else "starting Prefect (sooner after 'tunesmith up')"):
        yield
        check(settings)
        wake_server()


def explain(message: str, code: int) -> int:
    """Say why the command ends with this code, in red where something is wrong; the code."""
    Console(stderr=True, style="red" if code in (1, 2) else "yellow").print(
        f"tunesmith: {message}", highlight=False, markup=False, soft_wrap=True
    )
    return code
