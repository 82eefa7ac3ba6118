"""What llama.cpp makes of a GGUF file: token ids, losses and greedy tokens, as JSON on standard output.

Run by tests marked `slow` with the interpreter that TUNESMITH_LLAMA_CPP_PYTHON names, in whose
environment llama-cpp-python is installed; nothing of Tunesmith is imported.

    python llama_cpp_reference.py model.gguf questions.json [adapter.gguf]

questions.json: {"texts": [text], "rows": [[ids, first supervised position]], "prompts": [ids],
"tokens": count}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer the questions of one file."""
    import llama_cpp

    without_repacking(llama_cpp)
    gguf, questions, *adapter = sys.argv[1:]
    asked = json.loads(Path(questions).read_text())
    # Keys and values as float32 (type 0): the float16 of the default is not the model's own rounding.
    llama = llama_cpp.Llama(
        gguf,
        lora_path=adapter[0] if adapter else None,
        n_ctx=512,
        n_batch=512,
        n_ubatch=512,
        n_threads=1,  # with more, a busy machine spends its time in their barriers
        n_threads_batch=1,
        logits_all=True,
        type_k=0,
        type_v=0,
        flash_attn=False,
        verbose=False,
    )
    answer = {
        "texts": [llama.tokenize(text.encode(), add_bos=False, special=True) for text in asked["texts"]],
        "framed": llama.tokenize(b"a", add_bos=True, special=True),
        "losses": [losses(llama, ids, first) for ids, first in asked["rows"]],
        "greedy": [greedy(llama, ids, asked["tokens"]) for ids in asked["prompts"]],
        "metadata": {key: str(value)[:2000] for key, value in llama.metadata.items()},
    }
    print(json.dumps(answer))


def without_repacking(llama_cpp: Any) -> None:
    """Keep weights as they are in the file, as llama-cli does with --no-repack.

    llama.cpp's AMX kernels for quantised weights (llama-cpp-python 0.3.36) crash on some machines, with its
    own files too, and the Python binding has no argument for it.
    """
    defaults = llama_cpp.llama_model_default_params

    def plain() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_cpp.llama_model_default_params = plain
    llama_cpp.llama_model_default_params = plain


def losses(llama: Any, ids: list[int], first: int) -> list[float]:
    """Cross-entropy in nats of each token from position `first` on, given those before it."""
    import numpy as np

    llama.reset()
    llama.eval(ids)
    logits = np.array(llama.scores[: len(ids)], dtype=np.float64)  # (length, vocabulary)
    highest = logits.max(axis=1, keepdims=True)
    log_sums = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=1))
    return [float(log_sums[at - 1] - logits[at - 1, ids[at]]) for at in range(first, len(ids))]


def greedy(llama: Any, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens one after another, the end of the answer no exception."""
    import numpy as np

    llama.reset()
    llama.eval(ids)
    answer: list[int] = []
    while True:
        answer.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        if len(answer) == count:
            return answer
        llama.eval(answer[-1:])


if __name__ == "__main__":
    main()
