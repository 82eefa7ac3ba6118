"""What `tunesmith export` does for PEFT and the hub: find what is meant, write it, say what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from flows.card_facts import card_facts, prepared_folder, run_settings
from flows.targets import Target
from tasks.config import FuseSettings, TrackingSettings
from tasks.errors import InputError
from tasks.export.card import Subject, Use, write_card
from tasks.export.hf_folder import is_quantised, write_hf_folder
from tasks.home import runs_dir
from tasks.models.origin import find_origin
from tasks.prepare.chats import TEMPLATE_FILE
from tasks.publish import StepOutput, publishing
from tasks.tracking import read_record

METHODS = {"lora": "LoRA adapter", "dora": "DoRA adapter", "soft-prompt": "Soft prompt"}


def export_peft(target: Target, out: Path, name: str) -> None:
    """Write a target's adapter for PEFT, with its card, into the new folder `out`.

    Args:
        name: by which the card tells how to use it: of the hub, or of the folder.

    Raises:
        InputError: it has no adapter, or one that PEFT cannot have.
    """
    from tasks.export.peft import write_peft
    from tasks.train.adapters import read_adapter_config

    adapter = _adapter(target, "peft")
    origin = find_origin(target.model)
    base = origin.repo or target.model.name
    use = Use(
        "With PEFT and transformers:",
        "python",
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(base, "{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
    )
    further = Use(
        "To train it further on a Mac, with Tunesmith:",
        "sh",
        f"tunesmith finetune CONFIG.yaml model.source={base} train.from_adapter={name}",
    )
    kind = METHODS.get(read_adapter_config(adapter)["fine_tune_type"], "Adapter")
    subject = Subject(
        **card_facts(target),
        what=kind,
        library="peft",
        relation="adapter",
        origin=origin,
        uses=[use, further],
        tags=[kind.split()[0].lower()],
    )
    with publishing(out) as draft:
        write_peft(draft, adapter, target.model, origin)
        if target.template:
            (draft / TEMPLATE_FILE).write_text(target.template, encoding="utf-8")
        write_card(draft, subject)


def export_hf(target: Target, out: Path, name: str) -> None:
    """Write base and adapter, fused, in Hugging Face's layout, with a card, into the new folder `out`.

    The fused model is that of the run where it is there still, else it is made and proved anew.

    Raises:
        InputError: there is no adapter, it cannot be fused, or its prepared data is gone.
    """
    from tasks.fuse.merge import fuse_adapter

    adapter = _adapter(target, "hf")
    settings = run_settings(target)
    output = StepOutput(adapter, _fingerprint(target, adapter), True, 0.0)
    fused = fuse_adapter(
        settings.fuse if settings else FuseSettings(), target.model, output, _prepared(target, adapter)
    ).path
    quantised = is_quantised(fused)
    subject = Subject(
        **card_facts(target),
        what="Fine-tuned model",
        library="mlx" if quantised else "transformers",
        relation="finetune",
        origin=find_origin(target.model),
        uses=_uses_of_a_model(name, quantised),
    )
    with publishing(out) as draft:
        write_hf_folder(draft, fused)
        write_card(draft, subject)


EXPORTERS: Mapping[str, Callable[[Target, Path, str], None]] = {"peft": export_peft, "hf": export_hf}
"""By the name that `--to` takes."""


def check_out(out: Path) -> None:
    """Refuse a place where something is already, or that is not a person's."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise InputError(f"--out {out}: is there already; give a new folder")
    if out.resolve().is_relative_to(runs_dir() / "steps"):
        raise InputError(f"--out {out}: lies among Tunesmith's own step outputs; give another folder")


def _adapter(target: Target, to: str) -> Path:
    if target.adapter is None:
        raise InputError(
            f"{target.name}: is a model by itself, and --to {to} is of an adapter; give a run, NAME@champion "
            "or an adapter's folder"
        )
    return target.adapter


def _uses_of_a_model(name: str, quantised: bool) -> list[Use]:
    mlx = Use("With mlx-lm:", "sh", f'mlx_lm.generate --model {name} --prompt "…"')
    tunesmith = Use("With Tunesmith:", "sh", f"tunesmith chat {name}")
    transformers = Use(
        "With transformers:",
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    )
    return [mlx, tunesmith] if quantised else [mlx, transformers, tunesmith]


def _fingerprint(target: Target, adapter: Path) -> str:
    """Of the training where the run tells it, so that its fused model is found; else of the files."""
    from tasks.train.starting_point import adapter_fingerprint
    from tasks.train.step import TRAINING_TAG

    if target.run_id:
        tags = read_record(TrackingSettings(), target.run_id).tags
        if known := tags.get(TRAINING_TAG):
            return known
    return adapter_fingerprint(adapter)


def _prepared(target: Target, adapter: Path) -> StepOutput:
    folder = prepared_folder(adapter)
    if folder is None:
        raise InputError(
            f"{target.name}: its prepared data is not in {runs_dir() / 'steps' / 'prepare'}, and without "
            "test rows a fused model cannot be proved; 'tunesmith prepare' makes it again, or use --to peft"
        )
    return StepOutput(folder, folder.name, True, 0.0)
