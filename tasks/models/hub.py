"""Models from the Hugging Face hub: weights, config and tokenizer, never code."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.errors import InputError, OutageError
from tasks.patience import may_heal

PATTERNS = [
    *("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.tiktoken", "vocab.txt", "merges.txt"),
    "README.md",  # states the licence
]
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_name(source: str) -> bool:
    """Whether `source` has the form owner/name."""
    return NAME.fullmatch(source) is not None


def download_model(repo: str, revision: str | None) -> Path:
    """The local snapshot of a hub model, downloaded where it is not there already.

    Raises:
        InputError: the hub cannot be reached (an OutageError), or knows no such model or revision.
    """
    return _downloaded(repo, revision, PATTERNS)


def download_config(repo: str, revision: str | None) -> dict[str, Any]:
    """The `config.json` of a hub model, without its weights.

    Raises:
        InputError: as `download_model`.
    """
    config: dict[str, Any] = json.loads(
        (_downloaded(repo, revision, ["config.json"]) / "config.json").read_text(encoding="utf-8")
    )
    return config


def downloaded_model(repo: str, revision: str | None) -> Path | None:
    """The local snapshot of a hub model; None where there is none. The hub is not asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _downloaded(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    at = f" at revision '{revision}'" if revision else ""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except LocalEntryNotFoundError:
        raise OutageError(
            f"model.source = '{repo}'{at}: is not a path here, is not in the local hub cache, and the hub "
            "cannot be reached; go online once, or give the path of a folder or .gguf file"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise (OutageError if may_heal(error) else InputError)(
            f"model.source = '{repo}'{at}: the hub refuses it ({reason}); check the name and model.revision, "
            "and for a gated model run 'hf auth login'"
        ) from None
    except (httpx.HTTPError, OSError) as error:
        raise (OutageError if may_heal(error) else InputError)(
            f"model.source = '{repo}'{at}: cannot be downloaded ({error}); go online, or give the path of a "
            "folder or .gguf file"
        ) from None
