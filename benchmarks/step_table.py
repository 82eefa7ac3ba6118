"""What the cells come to: the figures of the benchmark, and tables for a README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LoadedCell = Mapping[str, Any]

ALL = -1
LEADS = ("135m", "tinyllama-1.1b", "llama-3.2-1b", "llama-3.2-3b", "tiny")
"""The model whose ratios are the benchmark's figures: the first of these that was measured."""


def figures_of(cells: Sequence[LoadedCell]) -> dict[str, float]:
    """The benchmark's figures, of what was measured.

    `step_ratio_k*` are of one kind of cell: of the first model of `LEADS`, LoRA, the largest batch, and
    chats where they were measured, else half a prompt at the greatest length.
    """
    steps = [cell for cell in cells if cell["kind"] == "step"]
    figures: dict[str, float] = {}
    for name, layers in (("k1", 1), ("k8", 8), ("all", ALL)):
        if found := [cell for cell in steps if cell["layers"] == layers]:
            figures[f"step_ratio_{name}"] = max(found, key=_leading)["ratio"]
    if found := [cell for cell in cells if cell["kind"] == "validation" and cell["layers"] == 8]:
        figures["validation_ratio_k8"] = max(found, key=_leading)["ratio"]
    if steps:
        figures["max_loss_difference"] = max(cell["loss_difference"] for cell in steps)
        figures["least_share_of_arithmetic"] = min(cell["share_of_arithmetic"] for cell in steps)
    if found := [cell for cell in cells if cell["kind"] == "curves"]:
        figures["max_curve_difference"] = max(cell["max_curve_difference"] for cell in found)
    if found := [cell for cell in cells if cell["kind"] == "memory"]:
        figures["memory_ratio"] = max(found, key=_leading)["memory_ratio"]
    return {name: float(f"{figure:.3g}") for name, figure in figures.items()}


def markdown(cells: Sequence[LoadedCell]) -> str:
    """The training steps as a Markdown table, a line each."""
    head = (
        "| model | base | layers | batch | rows | mlx-lm, tokens/s | Tunesmith, tokens/s | ratio "
        "| of arithmetic | peak memory, GB | loss difference |"
    )
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    memory = {_place(cell): cell for cell in cells if cell["kind"] == "memory"}
    lines += [_line(cell, memory.get(_place(cell))) for cell in cells if cell["kind"] == "step"]
    return "\n".join(lines)


def in_words(cell: LoadedCell) -> str:
    """A cell as it is printed once it is measured."""
    if cell["kind"] == "curves":
        return f"{cell['key']}: curves differ by {cell['max_curve_difference']:.1e} in {cell['steps']} steps"
    if cell["kind"] == "memory":
        our, their = cell["our_peak_gb"], cell["their_peak_gb"]
        return f"{cell['key']}: {cell['memory_ratio']:.0%} of the memory, {our:.2f} GB for {their:.2f}"
    told = f"{cell['key']}: {cell['ratio']:.2f}x"
    if cell["kind"] == "validation":
        return f"{told}, {cell['our_s']:.2f} s for mlx-lm's {cell['their_s']:.2f} s"
    told += f", {cell['share_of_arithmetic']:.0%} of arithmetic's {cell['arithmetic_ratio']:.2f}x"
    return f"{told}, losses differ by {cell['loss_difference']:.1e}"


def _leading(cell: LoadedCell) -> tuple[Any, ...]:
    return (
        -LEADS.index(cell["model"]),
        cell["method"] == "lora",
        cell["rows"] == "stdlib",
        cell["batch_size"],
        -abs(cell["prompt_percent"] - 50),
        cell["length"],
    )


def _place(cell: LoadedCell) -> tuple[Any, ...]:
    """What a cell is of, whatever is measured there."""
    names = ("model", "method", "layers", "batch_size", "length", "prompt_percent", "rows")
    return tuple(cell[name] for name in names)


def _line(cell: LoadedCell, of_memory: LoadedCell | None) -> str:
    depth = "all" if cell["layers"] == ALL else str(cell["layers"])
    rows = "chats" if cell["rows"] == "stdlib" else f"{cell['length']}, {cell['prompt_percent']}% prompt"
    memory = f"{of_memory['our_peak_gb']:.2f} for {of_memory['their_peak_gb']:.2f}" if of_memory else ""
    return (
        f"| {cell['model']} | {cell['base']} | {depth} | {cell['batch_size']} | {rows} "
        f"| {cell['their_tokens_per_second']:,.0f} | {cell['our_tokens_per_second']:,.0f} "
        f"| {cell['ratio']:.2f} | {cell['share_of_arithmetic']:.0%} | {memory} "
        f"| {cell['loss_difference']:.0e} |"
    )
