"""Ship: what was made, in the forms of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from flows.verbs.frame import SHIP, app, quiet_prefect, quiet_screen


@app.command(group=SHIP)
def export(
    target: str,
    /,
    *,
    to: Literal["gguf", "gguf-lora"],
    out: Path,
    kind: Annotated[Literal["f32", "f16", "bf16", "q8_0"] | None, Parameter(name="--type")] = None,
) -> None:
    """Write a model, or an adapter, for llama.cpp and Ollama, once it is proved to be the same.

    Parameters
    ----------
    target
        a run, NAME@champion, NAME/VERSION, an adapter's folder, or a model as model.source takes it
    to
        gguf: base and adapter as one file; gguf-lora: the adapter alone, for llama.cpp's --lora
    out
        a new folder; the file takes its name
    kind
        numbers of a gguf: f16, which is the default, f32, bf16 or q8_0
    """
    quiet_prefect()
    from flows.exporting_gguf import EXPORTERS, check_out
    from flows.tables import print_commands, print_places
    from flows.targets import find_target

    check_out(out)
    write, usual = EXPORTERS[to]
    with quiet_screen():
        exported = write(find_target(target), out.resolve(), kind or usual)
    console = Console()
    found = exported.difference
    proof = (
        "read back, every number is the adapter's own"
        if found is None
        else f"test loss {found.loss:.4f}, {found.relative:.1e} from the model's; "
        f"{found.tokens:.1%} of its greedy tokens differ"
    )
    print_places(console, {"exported": str(exported.file), "proof": proof})
    print_commands(console, {"ollama": f"ollama create {out.name} -f {out}/Modelfile"})
