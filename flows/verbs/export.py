"""Ship: what was made, in the layouts of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console

from flows.verbs.frame import SHIP, app, quiet_prefect, quiet_screen


@app.command(group=SHIP)
def export(
    target: str,
    /,
    *,
    to: Literal["peft", "hf"],
    out: Path,
    upload: str | None = None,
    public: bool = False,
) -> None:
    """Write an adapter, or the model it makes, for other tools, with a model card.

    Parameters
    ----------
    target
        a run, NAME@champion, NAME/VERSION, or an adapter's folder (of PEFT too)
    to
        peft: the adapter for PEFT and transformers; hf: base and adapter as one model
    out
        a new folder
    upload
        put it onto the hub under this name, owner/name; the token is read from HF_TOKEN
    public
        let everybody see what is uploaded; it is private otherwise
    """
    quiet_prefect()
    from flows.exporting import EXPORTERS, check_out
    from flows.tables import print_places
    from flows.targets import find_target
    from tasks.export.upload import check_upload
    from tasks.export.upload import upload as put_onto_the_hub

    check_out(out)
    if upload is not None:
        check_upload(upload)
    with quiet_screen():
        EXPORTERS[to](find_target(target), out.resolve(), upload or out.name)
        address = put_onto_the_hub(out, upload, public) if upload is not None else None
    places = {"exported": str(out), "card": str(out / "README.md")}
    print_places(Console(), places | ({"uploaded": address} if address else {}))
