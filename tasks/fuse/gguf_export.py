"""Exports for llama.cpp and Ollama: a GGUF file with a Modelfile, published when it proves to be the model.

The proof reads the file back by the import that any GGUF file goes through: its tokenizer has to give
the ids of the original, its weights the test loss and the greedy tokens of the adapter.
"""

from __future__ import annotations

import math
import shutil
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.errors import StepError
from tasks.fuse.fidelity import TEXTS, Behaviour, Difference, compare
from tasks.fuse.gguf_weights import Kind
from tasks.models.folder import ModelFolder
from tasks.prepare.splits import TokenRows
from tasks.publish import publishing, write_json

MODELFILE, EXPORT_FILE = "Modelfile", "export.json"

PERPLEXITY_TOLERANCE: dict[Kind, float] = {"f32": 0.005, "f16": 0.005, "bf16": 0.02, "q8_0": 0.02}
"""Largest relative difference of perplexity from the adapter's, by the file's number format."""

TOKEN_TOLERANCE: dict[Kind, float] = {"f32": 0.05, "f16": 0.05, "bf16": 0.1, "q8_0": 0.1}
"""Largest share of greedy tokens that the file's model chooses otherwise than the adapter."""

ODD_TEXTS = (
    *TEXTS,
    "naïve façade, Größe, Ελλάδα, привет, 日本語テキスト, 한국어, العربية, हिन्दी, ไทย",
    "😀👩‍👩‍👧‍👦🇫🇷👍🏽 ½ ² Ⅷ ٣٤",
    "1 12 123 1234 12345678 3.14159 1,000,000 0x1F 1e-5",
    "  two\n\n\nthree\t\ttabs \r\n    four     and trailing   ",
    "don't I'LL we've THE'S ''' '''' “curly” — … `code` ~^| <=> != -> // /* */",
)
"""In which splitting rules differ."""


@dataclass(frozen=True)
class Exported:
    """What was published.

    Attributes:
        file: the GGUF file; the Modelfile and export.json lie beside it.
        difference: of the file read back from the adapter; None where it is equal to the last bit.
    """

    file: Path
    difference: Difference | None


def export_gguf(
    out: Path,
    folder: Path,
    name: str,
    kind: Kind,
    rows: TokenRows,
    expected: Behaviour,
    system_prompt: str | None = None,
) -> Exported:
    """Publish a model folder as a GGUF file with a Modelfile in a new folder `out`.

    Args:
        folder: a fused model, or any other in MLX layout.
        name: of the model, and of the file but for its ending.
        rows, expected: what the adapter did, and on which rows.
        system_prompt: put before chats that have none, as in training.

    Raises:
        InputError: the model cannot be said in GGUF, with the reason.
        StepError: the file read back is not the model; nothing is published then.
    """
    from tasks.fuse.gguf_model import write_gguf

    file = f"{name}-{kind.upper()}.gguf"
    with publishing(out) as draft:
        write_gguf(draft / file, folder, name, kind)
        difference = _prove(draft / file, folder, name, kind, rows, expected)
        _write_modelfile(draft, folder, file, f"llama.cpp: llama-cli -m {file}", system_prompt)
        write_json(
            draft / EXPORT_FILE,
            {"kind": kind, "rows": len(rows), "adapter": asdict(expected), "export": asdict(difference)},
        )
    return Exported(out / file, difference)


def export_gguf_lora(
    out: Path, model: ModelFolder, adapter: Path, name: str, template: str | None, system_prompt: str | None
) -> Exported:
    """Publish a LoRA adapter as a GGUF file for `--lora`, with a Modelfile, in a new folder `out`.

    Args:
        adapter: a folder in mlx-lm's layout.
        name: of the file, but for its ending.
        template: the chat template in Jinja it was trained with; None for the model's own.
        system_prompt: put before chats that have none, as in training.

    Raises:
        InputError: it is no LoRA, or llama.cpp has no adapters for its model, with the reason.
        StepError: the file read back holds other numbers; nothing is published then.
    """
    from tasks.fuse.gguf_lora import write_gguf_lora

    file, base = f"{name}-lora-F32.gguf", f"{model.name}.gguf"
    note = (
        f"The adapter alone: put a GGUF file of its base model, {model.name}, beside it as {base}.\n"
        f"llama.cpp: llama-cli -m {base} --lora {file}"
    )
    with publishing(out) as draft:
        write_gguf_lora(draft / file, model, adapter)
        _write_modelfile(draft, model.path, base, note, system_prompt, file, template)
    return Exported(out / file, None)


def _prove(
    file: Path, folder: Path, name: str, kind: Kind, rows: TokenRows, expected: Behaviour
) -> Difference:
    from tasks.models.gguf_check import read_gguf
    from tasks.models.gguf_import import usual_precision, write_folder
    from tasks.models.load import load_model

    back = file.parent / "read-back"
    back.mkdir()
    try:
        write_folder(read_gguf(file), back, name, usual_precision())
        _check_tokens(folder, back)
        found = compare(load_model(back).model, rows, expected)
    finally:
        shutil.rmtree(back)
    _check(kind, expected, found)
    return found


def _check(kind: Kind, expected: Behaviour, found: Difference) -> None:
    apart = abs(math.expm1(found.loss - expected.loss))
    told = f"test loss {found.loss:.5f}, the adapter's {expected.loss:.5f}"
    way = "nothing was written; " + (
        "export with --type f32" if kind in ("q8_0", "bf16") else "please report it with the model's name"
    )
    if not apart <= PERPLEXITY_TOLERANCE[kind]:
        raise StepError(
            f"the {kind} file's perplexity is {apart:.2%} from the adapter's, over the "
            f"{PERPLEXITY_TOLERANCE[kind]:.1%} allowed ({told}); {way}"
        )
    if not found.tokens <= TOKEN_TOLERANCE[kind]:
        raise StepError(
            f"the {kind} file's model chooses {found.tokens:.1%} of the adapter's greedy tokens otherwise, "
            f"over the {TOKEN_TOLERANCE[kind]:.0%} allowed ({told}); {way}"
        )


def _check_tokens(folder: Path, back: Path) -> None:
    """Hold the tokenizer read back to the ids of the original, on texts as they are after NFC."""
    from tasks.prepare.tokenise import load_tokenizer

    ours, theirs = load_tokenizer(folder), load_tokenizer(back)
    for text in (unicodedata.normalize("NFC", text) for text in _texts(ours)):
        if ours.encode(text) != theirs.encode(text):
            raise StepError(
                f"the file's tokenizer gives other ids than the model's for {text[:60]!r}; nothing was "
                "written: use the fused model with mlx-lm"
            )


def _texts(tokenizer: Any) -> list[str]:
    special = list(tokenizer.all_special_tokens)
    return [*ODD_TEXTS, *special, "a" + "b".join(special) + " c"]


def _write_modelfile(
    draft: Path,
    folder: Path,
    file: str,
    note: str,
    system_prompt: str | None,
    adapter: str | None = None,
    template: str | None = None,
) -> None:
    """Write a Modelfile for the model of `folder` as `file`; a template given is laid over its own."""
    from tasks.fuse.gguf_tokens import adds_bos, end_ids, own_template
    from tasks.fuse.modelfile import chat_form, modelfile
    from tasks.prepare.templates import ChatTemplate
    from tasks.prepare.tokenise import load_tokenizer

    tokenizer = load_tokenizer(folder)
    source = template or own_template(tokenizer)
    start = str(tokenizer.bos_token) if adds_bos(tokenizer) else None
    form = chat_form(ChatTemplate(tokenizer, source), start) if source else None
    stops = [str(tokenizer.convert_ids_to_tokens(index)) for index in end_ids(folder, tokenizer)]
    note = f"Ollama: ollama create NAME -f {MODELFILE}\n{note}"
    text = modelfile(file, form, stops, note, adapter, system_prompt)
    (draft / MODELFILE).write_text(text, encoding="utf-8")
