"""Make the references that the GGUF import is tested against, with other people's programs.

Token ids come from llama.cpp, logits from transformers and PyTorch in float32, both reading the
GGUF file themselves. In an environment of its own (nothing of Tunesmith is imported):

    pip install torch transformers accelerate "gguf>=0.19" llama-cpp-python
    python benchmarks/make_gguf_references.py SmolLM2-135M-Instruct.Q4_1.gguf \
        tests/data/models/gguf_references.json

Takes half a minute and 3 GB of memory. `--full logits.npz` also writes every logit, for a comparison
by hand.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

# The file's own rule, and those of other model families laid over the same vocabulary.
RULES = ("smollm", "gpt-2", "default", "llama-bpe", "qwen2")
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "In 1969, 3 astronauts flew 384400 km; 2 of them walked on the Moon. Élan, naïveté, 東京, 😀.",
    "Once upon a time, in a village by the sea, there lived an old clockmaker who never slept. " * 8,
    "a",
)
TOP, SAMPLED = 20, 200
WORDS = (
    "The quick brown fox", "don't", "I'LL", "we've", "they're", "it's", "THE'S", "naïve", "façade",
    "Größe", "Ελλάδα", "привет", "мир", "日本語", "テキスト", "中文字符", "한국어", "العربية", "עברית",
    "हिन्दी",
    "ไทย", "😀", "👩‍👩‍👧‍👦", "🇫🇷", "👍🏽", "1", "12", "123", "1234", "12345678", "3.14159",
    "1,000,000", "٣٤", "Ⅷ", "²", "½", "x = y + z", "a->b", "<=>", "==", "!=", "def f(x):",
    "return x", "{'a': [1, 2]}", "// note", "/* c */", "#include <stdio.h>", "SELECT * FROM t;",
    "https://example.org/a?b=c", "user@example.org", "C:\\dir\\file", "$100", "50%", "`code`",
    "~tilde~", "^caret", "|pipe|", "\"quoted\"", "“curly”", "—dash—", "…", "\u00a0", "\u200b",
    "\u3000", "\ufeff", "e\u0301", "\u0301", "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    "<repo_name>", "<|im_start", "im_end|>", "<|unknown|>", "user", "assistant",
)  # fmt: skip
GAPS = (
    "",
    " ",
    "  ",
    "   ",
    "    ",
    "\n",
    "\n\n",
    " \n",
    "\n ",
    "\t",
    "\t\t",
    " \t ",
    "\r\n",
    "\r",
    "        ",
)
FIXED = (
    "", " ", "  ", "\n", "\t", "\n\n\n", " \n \n ", "Hello", " Hello", "Hello ", "  Hello  ",
    "Hello\n", "\nHello", "\tHello", "if x:\n    return 1\n", "if x:\n\treturn 1\n\n\n",
    "a\r\nb\r\n", "     a      b", "2024-01-31 12:34:56", "v1.2.3-rc4", "0x1F 1e-5",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|><|endoftext|>",
    "x<|im_end|>y", " <|im_end|> ", "''''", "'s's 't 'T", "!!!???...", "a" * 200, " " * 70,
    "\n" * 40, "=" * 64, "ab1cd2ef3", "\uff11\uff12\uff13 \uff14",
    "\U0001d518\U0001d52b\U0001d526\U0001d520\U0001d52c\U0001d521\U0001d522 \U0001d7d9\U0001d7da",
    "\x00\x01\x7f", "ﬁ ﬂ Å Å",
)  # fmt: skip


def main() -> None:
    """Write the references of one GGUF file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("references", type=Path)
    parser.add_argument("--full", type=Path)
    arguments = parser.parse_args()
    texts = [*FIXED, *drawn_texts(160)]
    ids = {rule: token_ids(arguments.gguf, rule, texts) for rule in RULES}
    prompts = [
        {"text": text, "ids": own} for text, own in zip(PROMPTS, prompt_ids(arguments.gguf), strict=True)
    ]
    logits = reference_logits(arguments.gguf, [prompt["ids"] for prompt in prompts])
    for index, (prompt, values) in enumerate(zip(prompts, logits, strict=True)):
        prompt.update(excerpt(values, random.Random(index)))
    references = {"texts": texts, "ids": ids, "prompts": prompts}
    arguments.references.write_text(json.dumps(references, ensure_ascii=True, separators=(",", ":")) + "\n")
    if arguments.full:
        import numpy as np

        np.savez(arguments.full, *logits)
    print(json.dumps({"texts": len(texts), "rules": len(RULES), "prompts": len(prompts)}))


def drawn_texts(count: int) -> list[str]:
    """Words and gaps joined at random, the same ones every time."""
    draw = random.Random(20260101)
    return [
        "".join(draw.choice(WORDS) + draw.choice(GAPS) for _ in range(draw.randint(2, 7)))
        for _ in range(count)
    ]


def token_ids(gguf: Path, rule: str, texts: list[str]) -> list[list[int]]:
    """llama.cpp's ids of each text, special tokens parsed, the splitting rule replaced by `rule`."""
    from llama_cpp import Llama

    overrides: dict[str, bool | int | float | str] = {"tokenizer.ggml.pre": rule}
    llama = Llama(str(gguf), vocab_only=True, verbose=False, kv_overrides=overrides)
    return [llama.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def prompt_ids(gguf: Path) -> list[list[int]]:
    """llama.cpp's ids of the prompts under the file's own rule."""
    return token_ids(gguf, "smollm", list(PROMPTS))


def reference_logits(gguf: Path, prompts: list[list[int]]) -> list[Any]:
    """transformers' logits of every position, (length, vocabulary) in float32, prompt by prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].numpy() for ids in prompts]


def excerpt(logits: Any, draw: random.Random) -> dict[str, Any]:
    """The last position's highest logits, and logits at positions and tokens drawn at random."""
    length, vocabulary = logits.shape
    top = [int(token) for token in logits[-1].argsort()[::-1][:TOP]]
    places = [(draw.randrange(length), draw.randrange(vocabulary)) for _ in range(SAMPLED)]
    return {
        "top": [[token, round(float(logits[-1, token]), 6)] for token in top],
        "sampled": [[row, token, round(float(logits[row, token]), 6)] for row, token in places],
    }


if __name__ == "__main__":
    main()
