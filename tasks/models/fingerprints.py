"""Identity by content: equal models in different folders have equal fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from tasks.home import cache_dir
from tasks.progress import progress
from tasks.publish import fingerprint

# What decides the numbers a model computes and the tokens it reads.
CONTENT = (
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "tokenizer*",
    "*.safetensors",
    "*.jinja",
)
EXTRA = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
)
CHUNK_BYTES = 1 << 22
REMEMBER_FROM_BYTES = 1 << 20


def folder_fingerprint(folder: Path) -> str:
    """The fingerprint of a model folder: 16 hexadecimal digits over names and contents of its files.

    Weights, config and tokenizer count; a README, a shard index or the folder's own name do not.
    """
    names = {path.name for pattern in CONTENT + EXTRA for path in folder.glob(pattern) if path.is_file()}
    return fingerprint({name: file_digest(folder / name) for name in sorted(names)})


def file_digest(path: Path) -> str:
    """The SHA-256 of a file. Of files from 1 MiB on it is remembered under path, size, mtime and inode."""
    path = path.resolve()
    status = path.stat()
    if status.st_size < REMEMBER_FROM_BYTES:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    identity = [status.st_size, status.st_mtime_ns, status.st_ino]
    known = _remembered().get(str(path))
    if isinstance(known, dict) and known.get("identity") == identity and isinstance(known.get("sha256"), str):
        return str(known["sha256"])
    digest = _sha256(path, status.st_size)
    _remember(str(path), {"identity": identity, "sha256": digest})
    return digest


def _sha256(path: Path, size_bytes: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, progress(f"reading {path.name}", total=size_bytes) as bar:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            bar.advance(len(chunk))
    return digest.hexdigest()


def _remembered() -> dict[str, Any]:
    try:
        known = json.loads((cache_dir() / "digests.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(path: str, entry: dict[str, Any]) -> None:
    # A writer between the read and the rename loses its entry, and its file is hashed once more.
    target = cache_dir() / "digests.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".digests.{uuid.uuid4().hex[:8]}.json")
    known = {name: value for name, value in _remembered().items() if os.path.exists(name)}
    draft.write_text(json.dumps({**known, path: entry}, indent=1, sort_keys=True), encoding="utf-8")
    draft.replace(target)
