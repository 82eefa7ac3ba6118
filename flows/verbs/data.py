"""Data: look at rows and make them ready."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from flows.verbs.frame import DATA, QUICKSTART, Data, Overrides, app, check, quiet_prefect, quiet_screen


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
    quiet_prefect()
    from flows.data import check_page, data_settings, prepare_command
    from flows.data import inspect as look
    from flows.tables import SAMPLES, print_commands, print_data_report
    from tasks.prepare.page import write_page

    settings = data_settings(data, model, overrides or [])
    if html is not None:
        check_page(html)
    check(settings)
    with quiet_screen():
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
    quiet_prefect()
    from flows.data import PAGE_FILE, data_settings, finetune_command
    from flows.data import prepare as make
    from flows.tables import print_commands, print_data_report, print_places

    settings = data_settings(data, model, overrides or [])
    check(settings)
    with quiet_screen():
        output, folder = make(settings, out)
    console = Console()
    print_data_report(console, output.read_json("report.json"), settings.train.batch_size)
    unchanged = "  (nothing has changed, so it was there already)" if output.reused else ""
    print_places(console, {"prepared": f"{folder}{unchanged}", "page": str(folder / PAGE_FILE)})
    print_commands(console, {"next": finetune_command(settings, QUICKSTART, overrides or [])})
