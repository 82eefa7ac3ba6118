"""Ship: what was made, in the forms of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from flows.verbs.frame import SHIP, app, quiet_prefect, quiet_screen
from tasks.errors import InputError


@app.command(group=SHIP)
def export(
    target: str,
    /,
    *,
    to: Literal["gguf", "gguf-lora", "peft", "hf"],
    out: Path,
    kind: Annotated[Literal["f32", "f16", "bf16", "q8_0"] | None, Parameter(name="--type")] = None,
    upload: str | None = None,
    public: bool = False,
) -> None:
    """Write an adapter, or the model it makes, for llama.cpp and Ollama, PEFT, transformers or the hub.

    Parameters
    ----------
    target
        a run, NAME@champion, NAME/VERSION, an adapter's folder (of PEFT too), or, for gguf, a model
    to
        gguf: base and adapter as one file; gguf-lora: the adapter alone, for llama.cpp's --lora;
        peft: the adapter for PEFT and transformers; hf: base and adapter as one model
    out
        a new folder; a GGUF file takes its name
    kind
        numbers of a gguf: f16, which is the default, f32, bf16 or q8_0
    upload
        put peft or hf onto the hub under this name, owner/name; the token is read from HF_TOKEN
    public
        let everybody see what is uploaded; it is private otherwise
    """
    quiet_prefect()
    if to in ("gguf", "gguf-lora"):
        if upload is not None:
            raise InputError(f"--upload {upload}: is of --to peft and hf; leave it out with --to {to}")
        _export_gguf(target, to, out, kind)
    else:
        if kind is not None:
            raise InputError(f"--type {kind}: is of --to gguf; leave it out with --to {to}")
        _export_folder(target, to, out, upload, public)


def _export_gguf(target: str, to: str, out: Path, kind: Literal["f32", "f16", "bf16", "q8_0"] | None) -> None:
    from flows.exporting import check_out
    from flows.exporting_gguf import EXPORTERS
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


def _export_folder(target: str, to: str, out: Path, upload: str | None, public: bool) -> None:
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
