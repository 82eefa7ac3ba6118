"""Data preparation beside what it cannot do without, and beside what others do it with.

    python benchmarks/prepare.py --quick     # 20,000 rows, a minute
    python benchmarks/prepare.py             # 200,000 rows, then 1,000,000 for the memory; 15 minutes

Chats made of the standard library's sources are prepared whole (read, checked, deduplicated, rendered,
tokenised, masked, split, written, reported), and in the same run the same rows go

- through the bare `tokenizers.encode_batch`, rendered already, a thousand at a time;
- through `datasets.map` with the same chat template, a thousand at a time.

`share_of_encode_batch` is the bare rate's time over ours (1.0 would be preparation for nothing),
`ratio_to_datasets_map` our rate over that of `datasets.map` with the reading of the file. Each runs in a
process of its own; imports are not counted, the loading of the tokenizer only in ours (0.7 s, which weighs
in the quick form); peak memory is the process's.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH_ROWS = 1000
MEMORY_ROWS = 1_000_000


def main() -> None:
    """Run, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20,000 rows, one round")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, file = arguments.child
        print(json.dumps(MEASURES[what](Path(file))))
        return
    count, rounds = (20_000, 1) if arguments.quick else (200_000, 2)
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder) / "rows.jsonl", count)
        seconds: dict[str, list[float]] = {what: [] for what in MEASURES}
        peak_mb: dict[str, float] = {}
        for _ in range(rounds):
            for what in MEASURES:
                done = child(what, rows)
                seconds[what].append(done["seconds"])
                peak_mb[what] = max(peak_mb.get(what, 0), done["peak_mb"])
                rate = count / done["seconds"]
                print(f"{what}: {rate:,.0f} rows/s, peak {done['peak_mb']:,.0f} MB", flush=True)
        ours, bare, mapped = (statistics.median(seconds[what]) for what in MEASURES)
        figures = {
            "rows": count,
            "share_of_encode_batch": round(bare / ours, 3),
            "rows_per_second": round(count / ours),
            "peak_memory_mb": round(peak_mb["prepare"]),
            "ratio_to_datasets_map": round(mapped / ours, 2),
            "peak_memory_mb_datasets_map": round(peak_mb["datasets.map"]),
        }
        if not arguments.quick:
            rows = write_rows(Path(folder) / "rows.jsonl", MEMORY_ROWS)
            figures["peak_memory_mb_1m_rows"] = round(child("prepare", rows)["peak_mb"])
    from record import record

    record("prepare", figures, arguments.quick, {"seconds": seconds, "peak_memory_mb": peak_mb})


def write_rows(path: Path, count: int) -> Path:
    """Chats of one question (10 to 40 words) and one answer (20 to 120), no two alike."""
    words = [
        word
        for source in sorted(Path(json.__file__).parent.parent.glob("*.py"))[:80]
        for word in source.read_text(encoding="utf-8", errors="replace").split()
    ]
    draw = random.Random(0)

    def some(low: int, high: int) -> str:
        start = draw.randrange(len(words) - high)
        return " ".join(words[start : start + draw.randint(low, high)])

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question = {"role": "user", "content": f"{number}: {some(10, 40)}"}
            answer = {"role": "assistant", "content": some(20, 120)}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    return path


def child(what: str, rows: Path) -> dict[str, float]:
    """One measure in a process of its own."""
    command = [sys.executable, __file__, "--child", what, str(rows)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure_prepare(rows: Path) -> dict[str, float]:
    """Everything that `tunesmith prepare` does."""
    from tasks.config import DataSettings, ModelSettings
    from tasks.models.resolve import resolve_model
    from tasks.prepare.pipeline import inspect_data

    model = resolve_model(ModelSettings())
    started = time.perf_counter()
    report = inspect_data(DataSettings(source=str(rows), max_seq_length=1 << 20), model)
    return _measured(started, report["rows_used"])


def measure_encode_batch(rows: Path) -> dict[str, float]:
    """The tokenizer alone, over text rendered before."""
    tokenizer = _tokenizer()
    texts: list[str] = []
    with rows.open(encoding="utf-8") as lines:
        for line in lines:
            texts.append(tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False))
    backend = tokenizer.backend_tokenizer
    started = time.perf_counter()
    for start in range(0, len(texts), BATCH_ROWS):
        backend.encode_batch(texts[start : start + BATCH_ROWS], add_special_tokens=False)
    return _measured(started, len(texts))


def measure_datasets_map(rows: Path) -> dict[str, float]:
    """The usual way: load the file as a dataset, map the chat template and the tokenizer over it."""
    import datasets

    tokenizer = _tokenizer()
    datasets.disable_progress_bars()

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        loaded = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=cache)
        mapped = loaded.map(encode, batched=True, batch_size=BATCH_ROWS, remove_columns=["messages"])
        return _measured(started, len(mapped))


MEASURES = {
    "prepare": measure_prepare,
    "encode_batch": measure_encode_batch,
    "datasets.map": measure_datasets_map,
}


def _tokenizer() -> Any:
    from tasks.config import ModelSettings
    from tasks.models.resolve import resolve_model
    from tasks.prepare.tokenise import load_tokenizer

    return load_tokenizer(resolve_model(ModelSettings()).path)


def _measured(started: float, rows: int) -> dict[str, float]:
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "rows": rows, "peak_mb": peak / (1e6 if sys.platform == "darwin" else 1e3)}


if __name__ == "__main__":
    main()
