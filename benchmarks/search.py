"""Wall clock of one `tunesmith search` beside that of its trials as `mlx_lm.lora` runs, one after another.

    python benchmarks/search.py --quick              # 6 trials of 100 rows, one epoch
    python benchmarks/search.py --folder DIR         # 27 trials, 3 epochs: a day; goes on where it stopped
    python benchmarks/search.py --rows 200           # of so many rows: two hours on two cores

Both search the bundled model and the standard library's docstrings: LoRA of ranks 8 to 64 with alpha 32 on
the last 2, 4, 8 or 16 layers, learning rates from 3e-5 to 1e-3, batches of 4 with prompts masked, validation
over the whole set once an epoch. The search proposes 27 settings; the same 27 are what mlx_lm would train,
each in a process of its own, to the full length. Of these runs five or more are timed here, spread over the
layers, and the others' times follow from a line through them: seconds = a + b x layers. MLX has the same BLAS
on either side.

`speedup` is the time of the 27 runs over that of the search, with its start, Prefect, MLflow and Optuna.
`best_loss_ratio` is the best validation loss of the search over the best of all 27 trained to their ends by
Tunesmith (without halving). Under "parts" each thing that makes the difference stands by itself:

    load                seconds to start a process and load the base, which a search does once a child
    prefix              seconds of an update of 8 layers without the cache of frozen layers, over with it
    supervised          the same without the head at supervised positions only, over with it
    halving             updates of 27 trainings to the end, over those of the search
    side_by_side        seconds of training within the search, over its wall clock

What is finished stays in the folder, and a run of the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

CHECKOUT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(CHECKOUT)  # this file has the name of a package, which it would stand before

import tasks  # noqa: E402, F401  (sets the process up before MLX is imported)

LAYERS = (2, 4, 8, 16)
QUICK_ROWS = 100
STEPS_OF_PARTS, WARM_STEPS = 16, 4


def main() -> None:
    """Run, measure, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"6 trials of {QUICK_ROWS} rows")
    parser.add_argument("--rows", type=int, help="of the data; all by default")
    parser.add_argument("--folder", type=Path, help="where all is kept, to go on there")
    parser.add_argument("--timed", type=int, default=5, help="runs of mlx_lm that are timed")
    parser.add_argument("--model", help="a model folder, in place of the bundled model")
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rows = QUICK_ROWS
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="tunesmith-search-"))
    folder.mkdir(parents=True, exist_ok=True)
    if chosen.part:
        print(json.dumps(PARTS[chosen.part](folder)))
        return
    measured = _measure(folder, chosen)
    figures = figures_of(measured)
    print(json.dumps(measured["parts"], indent=2))
    sys.path.append(str(Path(__file__).parent))
    from record import record

    record("search", figures, chosen.quick, measured)


def figures_of(measured: Mapping[str, Any]) -> dict[str, float]:
    """What the benchmark claims, from what was measured."""
    theirs_s = sum(all_seconds(measured["trials"], measured["timed"]))
    return {
        "speedup": round(theirs_s / measured["search_s"], 2),
        "best_loss_ratio": round(measured["best_loss"] / measured["best_exhaustive_loss"], 4),
        "trials": len(measured["trials"]),
        "search_s": round(measured["search_s"], 1),
        "mlx_lm_s": round(theirs_s, 1),
        "mlx_lm_runs_timed": len(measured["timed"]),
    }


def all_seconds(trials: Sequence[Mapping[str, Any]], timed: Mapping[str, float]) -> list[float]:
    """Seconds of every trial as a run of mlx_lm: those timed, the others by a line over the layers."""
    import numpy as np

    layers = [trials[int(number)]["num_layers"] for number in timed]
    if len(set(layers)) > 1:
        slope, start = np.polyfit(layers, list(timed.values()), 1)
    else:
        slope, start = 0.0, float(np.mean(list(timed.values())))
    return [
        timed.get(str(number), float(start + slope * trial["num_layers"]))
        for number, trial in enumerate(trials)
    ]


def to_time(trials: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """Numbers of trials spread over the layers: in turn the first of each number of layers, the second, …"""
    by_layers: dict[int, list[int]] = {}
    for number, trial in enumerate(trials):
        by_layers.setdefault(trial["num_layers"], []).append(number)
    rows = [
        numbers[place]
        for place in range(len(trials))
        for _, numbers in sorted(by_layers.items())
        if place < len(numbers)
    ]
    return rows[:count]


def _measure(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Every part in turn; each is kept in the folder when it is finished."""
    kept = _Kept(folder / "measured.json")
    config = folder / "search.yaml"
    if not config.exists():
        config.write_text(yaml.safe_dump(our_settings(chosen)), encoding="utf-8")
    search = kept.get("search", lambda: _search(folder, kept))
    timed: dict[str, float] = {}
    for number in to_time(search["trials"], max(chosen.timed, 1)):
        trial = search["trials"][number]
        timed[str(number)] = kept.get(f"mlx_lm {number}", lambda trial=trial: _mlx_lm(folder, search, trial))
        print(f"mlx_lm.lora of trial {number}: {timed[str(number)]:.1f} s", flush=True)
    exhaustive = kept.get("exhaustive", lambda: _part(folder, "exhaustive"))
    parts = {name: kept.get(name, lambda name=name: _part(folder, name)) for name in ("load", "engine")}
    steps = [trial["step"] for trial in search["trials"]]
    full = [trial["steps"] for trial in search["trials"]]
    told = {
        "load_s": parts["load"]["load_s"],
        **parts["engine"],
        "halving": sum(full) / sum(steps),
        "side_by_side": sum(trial["seconds"] for trial in search["trials"]) / search["study_s"],
    }
    return {**search, "timed": timed, "best_exhaustive_loss": exhaustive["best_loss"], "parts": told}


class _Kept:
    """Results by name, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result of this name, measured when it is not there."""
        if name not in self.known:
            self.put(name, measure())
        return self.known[name]

    def put(self, name: str, value: Any) -> None:
        self.known[name] = value
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps(self.known, indent=2))
        draft.replace(self._path)


def our_settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """The search; without what mlx_lm has nothing beside: evaluating, fusing and registering the best."""
    layers = _layers(chosen.model)
    return {
        "name": "benchmark",
        **({"model": {"source": chosen.model}} if chosen.model else {}),
        "data": {"source": "stdlib", **({"max_rows": chosen.rows} if chosen.rows else {})},
        "train": {
            "batch_size": 4,
            "epochs": 1 if chosen.quick else 3,
            "schedule": "constant",
            "warmup_steps": 0,
        },
        "search": {
            "trials": 6 if chosen.quick else 27,
            "budget": "75%",
            "num_layers": [count for count in LAYERS if count <= layers],
            **({"first_rung": 0.3} if chosen.quick else {}),
            "finetune": False,
        },
    }


def _layers(model: str | None) -> int:
    if model is None:
        return max(LAYERS)
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    return int(config["num_hidden_layers"])


def _search(folder: Path, kept: _Kept) -> dict[str, Any]:
    """`tunesmith search`, or going on with it; the seconds of all its processes together."""
    command = [sys.executable, "-m", "flows.cli", "search"]
    home = folder / "ours"
    home.mkdir(exist_ok=True)
    begun = (home / "runs" / "optuna.db").exists()
    spent = kept.known.get("spent_s", 0.0)
    started = time.perf_counter()
    try:
        _run([*command, *(["--resume"] if begun else [str(folder / "search.yaml")])], _homes(home))
    finally:
        spent += time.perf_counter() - started
        kept.put("spent_s", spent)
    print(f"tunesmith search: {spent:.1f} s", flush=True)
    return {"search_s": spent, **_part(folder, "study")}


def _mlx_lm(folder: Path, search: Mapping[str, Any], trial: Mapping[str, Any]) -> float:
    """Seconds of one `mlx_lm.lora` of a trial's settings, as a whole process."""
    theirs = folder / "lora.yaml"
    theirs.write_text(yaml.safe_dump(their_settings(search, trial, folder)), encoding="utf-8")
    started = time.perf_counter()
    _run([sys.executable, "-m", "mlx_lm", "lora", "--train", "-c", str(theirs)], _blas())
    return time.perf_counter() - started


def their_settings(search: Mapping[str, Any], trial: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A trial as mlx_lm takes it: scale is alpha / rank, and iterations are updates."""
    return {
        "model": search["model"],
        "data": search["data"],
        "adapter_path": str(folder / "adapters"),
        "num_layers": trial["num_layers"],
        "lora_parameters": {"rank": trial["rank"], "scale": 32 / trial["rank"], "dropout": 0.0},
        "optimizer": "adamw",
        "learning_rate": trial["learning_rate"],
        "batch_size": 4,
        "iters": trial["steps"],
        "mask_prompt": True,
        "steps_per_eval": search["epoch_steps"],
        "val_batches": -1,
    }


def _study(folder: Path) -> dict[str, Any]:
    """What the search has found: its trials in order, its best, and where model and data lie."""
    from search.study import read_study, study_names
    from tasks.prepare.splits import load_splits
    from tasks.train.batches import updates_per_epoch

    settings, model, data = _inputs(folder)
    study = read_study(study_names()[0])
    trials = [study.trials[number] for number in sorted(study.trials)]
    best = study.best()
    assert best is not None
    plain = [
        {
            **dict(trial.params),
            "step": trial.step,
            "steps": trial.standing.rung_steps[-1],
            "seconds": trial.standing.seconds,
        }
        for trial in trials
        if trial.state != "over budget"
    ]
    return {
        "trials": plain,
        "best_loss": best.val_loss,
        "study_s": study.attributes["seconds"],
        "children": study.attributes["workers"],
        "model": str(model.path),
        "data": str(data.path),
        "epoch_steps": updates_per_epoch(load_splits(data.path)["train"], settings.train.batch_size, 1),
    }


def _exhaustive(folder: Path) -> dict[str, Any]:
    """The best loss of all trials trained to their ends; those that are there already are found."""
    from search.space import proposed
    from tasks.train.trial import WarmBase, train_trial

    settings, model, data = _inputs(folder)
    base = WarmBase(model)
    layers = int(model.language_config()["num_hidden_layers"])
    epoch = _study(folder)["epoch_steps"]
    losses = []
    for trial in _study(folder)["trials"]:
        params = {name: trial[name] for name in ("learning_rate", "rank", "num_layers")}
        wanted = proposed(settings, params, layers).model_copy(
            update={"steps_per_eval": max(1, epoch // 9), "minutes_per_save": 1.0}
        )
        reached = train_trial(wanted, base, data, lambda *_: None, None)
        losses.append(min(loss for _, loss in reached.val_losses))
        print(f"to the end: {params} {losses[-1]:.4f}", file=sys.stderr, flush=True)
    return {"best_loss": min(losses), "losses": losses}


def _load(folder: Path) -> dict[str, float]:
    """Seconds from the start of a process until the base is in its memory."""
    import psutil

    from tasks.train.trial import WarmBase

    WarmBase(_inputs(folder)[1])
    return {"load_s": time.time() - psutil.Process().create_time()}


def _engine(folder: Path) -> dict[str, float]:
    """An update of half of the deepest space, plain over with each of the two ideas."""
    from tasks.train import supervised
    from tasks.train.trial import WarmBase

    settings, model, data = _inputs(folder)
    base = WarmBase(model)
    kind = type(base.network)
    layers = sorted(count for count in LAYERS if count <= len(base.network.layers))
    depth = layers[len(layers) // 2]

    def seconds(prefix: str, gathers: bool) -> float:
        supervised._verdicts[kind] = gathers
        return _update_s(settings, base, data, depth, prefix)

    cached, uncached, everywhere = seconds("always", True), seconds("never", True), seconds("always", False)
    return {"prefix": uncached / cached, "supervised": everywhere / cached}


def _update_s(settings: Any, base: Any, data: Any, depth: int, prefix: str) -> float:
    """Median seconds of an update after the first few, which compile."""
    from tasks.train.trial import train_trial

    change = {"num_layers": depth, "frozen_prefix": prefix, "steps_per_eval": 10**6, "valid_rows": 1}
    seed = time.time_ns() % 2**31  # else the second of two equal trainings would be found finished
    wanted = settings.train.model_copy(update={**change, "max_steps": STEPS_OF_PARTS, "seed": seed})
    seconds: list[float] = []

    def note(step: int, metrics: Mapping[str, float]) -> None:
        if "iterations_per_second" in metrics:
            seconds.append(1 / metrics["iterations_per_second"])

    train_trial(wanted, base, data, note, None)
    return median(seconds[WARM_STEPS:] or seconds)


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "study": _study,
    "exhaustive": _exhaustive,
    "load": _load,
    "engine": _engine,
}
"""Each in a process of its own, in the home of the search."""


def _inputs(folder: Path) -> tuple[Any, Any, Any]:
    """Settings, model and prepared data of the search, found again."""
    from tasks.config import load_settings
    from tasks.models.resolve import resolve_model
    from tasks.prepare.pipeline import prepare_data

    settings = load_settings(folder / "search.yaml")
    model = resolve_model(settings.model)
    return settings, model, prepare_data(settings.data, model)


def _part(folder: Path, name: str) -> Any:
    command = [sys.executable, __file__, "--part", name, "--folder", str(folder)]
    return json.loads(_run(command, _homes(folder / "ours")).splitlines()[-1])


def _homes(folder: Path) -> dict[str, str]:
    """A home of the benchmark's own: no database, no cache and no server that was there before."""
    names = {"TUNESMITH_HOME": "runs", "TUNESMITH_CACHE": "cache", "PREFECT_HOME": "prefect"}
    return {name: str(folder / place) for name, place in names.items()}


def _blas() -> dict[str, str]:
    """The BLAS that Tunesmith loads ahead of MLX's own, for a process that does not."""
    from tasks.process import load_blas

    found = load_blas()
    return {"LD_PRELOAD": found} if found else {}


def _run(command: list[str], environment: Mapping[str, str]) -> str:
    """What a command prints, which has to succeed."""
    whole = {**os.environ, "PYTHONPATH": str(CHECKOUT), **environment}
    done = subprocess.run(command, env=whole, cwd=CHECKOUT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)


if __name__ == "__main__":
    main()
