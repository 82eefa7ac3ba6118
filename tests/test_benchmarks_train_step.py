"""The comparison of training steps: what it computes, and its quick form on a tiny random model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import train_step  # noqa: E402
from step_cells import (  # noqa: E402
    ALL,
    Cell,
    arithmetic_ratio,
    firsts,
    measure_curves,
    measure_step,
    peaks,
)
from step_models import SHAPES, Base, as_ours, head_over_body, make_base  # noqa: E402
from step_rows import made_rows, positions, their_rows  # noqa: E402
from step_table import figures_of, markdown  # noqa: E402
from step_trainers import (  # noqa: E402
    OurTrainer,
    TheirTrainer,
    batch_of,
    cache_of_its_own,
    exactly_supervised,
)

from tasks.prepare.splits import TokenRows  # noqa: E402

FIGURES = {"step_ratio_k8", "validation_ratio_k8", "max_loss_difference"}

CELL = Cell("step", "tiny", "lora", 4, batch_size=2, length=16, prompt_percent=50)


@pytest.fixture(scope="module", autouse=True)
def uncompiled() -> Iterator[None]:
    """On CPU a compiled step runs the C++ compiler for seconds; what is computed is the same."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def base() -> Base:
    return make_base("tiny", "lora")


@pytest.mark.parametrize(
    ("shape", "depth", "ratio"),
    [("llama-3.2-3b", 4 / 28, 3.3), ("tinyllama-1.1b", 1.0, 1.03)],
)
def test_arithmetic_is_that_of_the_shapes(shape: str, depth: float, ratio: float) -> None:
    assert arithmetic_ratio(depth, head_over_body(SHAPES[shape]), 0.5) == pytest.approx(ratio, abs=0.05)


def test_head_over_body_counts_the_weights_of_the_products(base: Base) -> None:
    body = sum(array.size for name, array in base.weights.items() if array.ndim == 2 and "layers" in name)
    assert head_over_body(base.config) == base.weights["model.embed_tokens.weight"].size / body


def test_made_rows_supervise_the_share_that_is_asked_for() -> None:
    for percent in (0, 50, 80):
        rows = made_rows("tiny", 3, 40, percent)
        assert positions(rows) == 3 * 40
        assert int(rows.supervised.sum()) == round(3 * 40 * (1 - percent / 100))


def test_both_sides_supervise_the_same_tokens(base: Base) -> None:
    rows = TokenRows.from_rows(
        [
            (list(range(10, 30)), [False] * 8 + [True] * 12),
            (list(range(40, 52)), [False] * 3 + [True] * 6 + [False] * 3),
        ]
    )
    ours, theirs = sides(base, rows)
    ours_loss = ours.step(next(ours.groups()))
    batch = their_rows(rows, np.array([0, 1]))
    assert theirs.loss(exactly_supervised(batch)) == pytest.approx(ours_loss, rel=1e-6)
    assert theirs.loss(batch_of(batch)) != pytest.approx(ours_loss, rel=1e-6), "mlx-lm's padding counts"


def test_rows_supervised_in_two_places_are_refused() -> None:
    rows = TokenRows.from_rows([([5, 6, 7, 8], [False, True, False, True])])
    with pytest.raises(ValueError, match="several places"):
        their_rows(rows, np.array([0]))


def test_a_step_is_measured_on_both_sides_and_a_wrong_loss_is_seen(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = measure_step(CELL, (base, base), None, steps=3)
    assert figures["ratio"] == figures["our_tokens_per_second"] / figures["their_tokens_per_second"]
    assert figures["blocks"]["our_tokens"] == figures["blocks"]["their_tokens"] == [3 * 2 * 17]
    assert (figures["f"], figures["c"]) == (0.4, 0.5)
    assert figures["loss_difference"] < 1e-6
    honest = OurTrainer.step
    monkeypatch.setattr(OurTrainer, "step", lambda self, group: honest(self, group) * 1.001)
    assert measure_step(CELL, (base, base), None, 1)["loss_difference"] == pytest.approx(1e-3, rel=0.01)


def test_curves_are_those_of_both_trainings(base: Base) -> None:
    figures = measure_curves(Cell("curves", "tiny", "lora", 4, 2, 16, 50), (base, base), steps=5)
    assert len(figures["our_losses"]) == len(figures["their_losses"]) == 5
    assert len(set(figures["their_losses"])) == 5, "it learns, or the batches differ"
    assert figures["max_curve_difference"] < 1e-4


@pytest.mark.parametrize("side", ["our", "their"])
def test_the_peak_of_a_side_holds_at_least_its_steps(side: str) -> None:
    found = peaks(side, CELL)
    assert 0 < found["steps_peak_gb"] <= found["peak_gb"] < 0.1


def test_a_base_of_4_bits_is_held_as_mlx_lm_has_it_and_as_float32(base: Base) -> None:
    quantised = make_base("tiny", "qlora")
    ours = as_ours(quantised)
    assert "model.layers.0.mlp.up_proj.scales" in quantised.weights
    assert all(array.dtype == mx.float32 for array in ours.weights.values())
    tokens = mx.array([[5, 6, 7]])
    assert mx.allclose(quantised.copy()(tokens), ours.copy()(tokens), atol=1e-4)


def test_of_each_shape_the_first_is_kept() -> None:
    assert list(firsts(["a", "bb", "c", "dd", "eee"], len)) == ["a", "bb", "eee"]


def test_the_figures_are_of_the_leading_cells() -> None:
    cells = [
        step(layers=8, ratio=2.0, batch_size=4, rows="stdlib", prompt_percent=0, length=0),
        step(layers=8, ratio=9.0, batch_size=4, prompt_percent=50),
        step(layers=8, ratio=9.0, model="llama-3.2-1b"),
        step(layers=1, ratio=3.0, batch_size=1, prompt_percent=50),
        step(layers=1, ratio=4.0, batch_size=4, prompt_percent=50),
        step(layers=1, ratio=5.0, batch_size=4, prompt_percent=80),
        step(layers=ALL, ratio=1.1, method="qlora"),
        step(kind="memory", layers=ALL, method="qlora", our_peak_gb=1, their_peak_gb=2, memory_ratio=0.5),
    ]
    figures = figures_of(cells)
    assert figures["step_ratio_k8"] == 2.0
    assert figures["step_ratio_k1"] == 4.0
    assert figures["step_ratio_all"] == 1.1
    assert figures["max_loss_difference"] == 1e-7
    assert figures["least_share_of_arithmetic"] == 0.9
    assert figures["memory_ratio"] == 0.5
    lines = markdown(cells).splitlines()
    assert len(lines) == 2 + len(cells) - 1
    assert [line.count("1.00 for 2.00") for line in lines] == [0] * 8 + [1]


def test_the_quick_form_runs_and_goes_on_after_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = tmp_path / "cells.jsonl"
    arguments = ["--quick", "--models", "tiny", "--layers", "8", "--length", "16", "--steps", "1"]
    arguments += ["--cells", str(cells)]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *arguments])
    train_step.main()
    printed = capsys.readouterr().out.splitlines()[-1]
    first = json.loads(printed)["figures"]
    assert set(first) >= FIGURES
    assert first["max_loss_difference"] < 1e-6
    kept = cells.read_text() + '{"key": "cut o'
    cells.write_text(kept)
    train_step.main()
    assert capsys.readouterr().out.splitlines()[-1] == printed, "a line that was cut off is none"
    assert cells.read_text() == kept, "nothing is measured twice"


def test_cells_of_other_code_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = tmp_path / "cells.jsonl"
    wanted = [Cell("step", "tiny", "lora", layers, 4, 16, 50) for layers in (1, 8, ALL)]
    wanted.append(Cell("validation", "tiny", "lora", 8, 4, 16, 50))
    old = [{**step(), **asdict(cell), "key": cell.key, "code": "older"} for cell in wanted]
    cells.write_text("\n".join(map(json.dumps, old)) + '\n{"key": "cut o')
    measured: list[str] = []

    def measure(cell: Cell, *_: Any) -> dict[str, float]:
        measured.append(cell.key)
        return {"ratio": 1.0, "our_s": 1.0, "their_s": 1.0} if cell.kind == "validation" else step()

    monkeypatch.setattr(train_step, "_figures", measure)
    arguments = ["--quick", "--models", "tiny", "--length", "16", "--cells", str(cells)]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *arguments])
    train_step.main()
    assert measured == [cell.key for cell in wanted]
    train_step.main()
    assert measured == [cell.key for cell in wanted], "what followed the line that was cut off was kept"


def sides(base: Base, rows: TokenRows) -> tuple[OurTrainer, TheirTrainer]:
    with cache_of_its_own():
        ours = OurTrainer(base.copy(), rows, CELL.settings())
    return ours, TheirTrainer(base.copy(), ours.weights, CELL.settings())


def step(**changes: Any) -> dict[str, Any]:
    cell = {
        "kind": "step",
        "model": "135m",
        "method": "lora",
        "layers": 8,
        "batch_size": 1,
        "length": 64,
        "prompt_percent": 0,
        "rows": "synthetic",
        "base": "float32",
        "ratio": 1.0,
        "loss_difference": 1e-7,
        "share_of_arithmetic": 0.9,
        "arithmetic_ratio": 1.1,
        "our_tokens_per_second": 2.0,
        "their_tokens_per_second": 1.0,
    }
    return {**cell, **changes}
