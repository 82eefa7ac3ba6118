"""A guard of general ability: the loss on texts that have nothing to do with the training.

The texts are paragraphs of what Python packages say about themselves, which every installation has: no
file has to be brought and nothing is fetched. A loss that rises here says that the model forgets. The
texts depend on the packages' versions, so figures compare where `texts` is equal: always, of base and tuned
of one evaluation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.prepare.splits import TokenRows

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

PACKAGES = (
    "cyclopts", "datasketch", "fastapi", "filelock", "gguf", "jinja2", "matplotlib", "mlflow", "mlx",
    "mlx-lm", "numpy", "optuna", "pandas", "platformdirs", "prefect", "psutil", "pyarrow", "pydantic",
    "pyyaml", "rich", "sacrebleu", "safetensors", "sqlalchemy", "tokenizers", "transformers", "zstandard",
)  # fmt: skip
"""What this project depends on."""

SHORTEST, LONGEST = 120, 1500
"""Characters of a paragraph."""

LENGTH_TOKENS = 64
"""Of a text so much is used: enough to tell models apart, and cheap."""


def general_texts(count: int, data: Path) -> list[str]:
    """Up to `count` paragraphs of prose that no row of the training split of prepared data holds.

    They are chosen by hash, so the same packages give the same texts in the same order.
    """
    unseen = {digest(text): text for text in _all_texts()}
    with (data / "train.jsonl").open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            for paragraph in _paragraphs_of(json.loads(line)):
                unseen.pop(digest(paragraph), None)
    return list(unseen.values())[:count]


def general_rows(texts: list[str], tokenizer: TokenizerWrapper) -> TokenRows:
    """The beginnings of the texts as tokens, supervised throughout, without a chat template."""
    from tasks.prepare.rows import Row
    from tasks.prepare.tokenise import chat_encoder

    encoder = chat_encoder(tokenizer)
    encoded = encoder.encode(encoder.lay_out([Row(0, "text", [], text) for text in texts]))
    return TokenRows.from_rows(
        [(tokens[:LENGTH_TOKENS], mask[:LENGTH_TOKENS]) for tokens, mask in encoded.rows()]
    )


def digest(text: str) -> bytes:
    """Of a text, whatever its white space."""
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


@cache
def _all_texts() -> tuple[str, ...]:
    texts = {text for package in PACKAGES for text in _prose(package)}
    return tuple(sorted(texts, key=digest))


def _prose(package: str) -> Iterator[str]:
    """The paragraphs of a package's description that are sentences, without their markup."""
    try:
        description = distribution(package).metadata.json.get("description")
    except PackageNotFoundError:
        return
    for paragraph in _paragraphs(str(description or "")):
        text = MARKUP.sub("", LINK.sub(lambda link: link[1] or link[2] or "", paragraph))
        if SHORTEST <= len(text) <= LONGEST and SENTENCES.fullmatch(text):
            yield text


LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|`([^`<]+) <[^>]*>`_{1,2}")
MARKUP = re.compile(r"\*\*|``?|_{1,2}\b(?=\s|$)")
SENTENCES = re.compile(r"[A-Z][^|<>{}\[\]=#*/\\_@]*[.!?]")
"""A capital first and a full stop last, and nothing between them that prose has no use for."""


def _paragraphs_of(row: dict[str, Any]) -> Iterator[str]:
    texts = [row["text"]] if "text" in row else [turn["content"] for turn in row["messages"]]
    for text in texts:
        yield from _paragraphs(text or "")


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
