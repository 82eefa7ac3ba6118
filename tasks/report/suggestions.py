"""What to try next, from the evidence of a run: a sentence each, with the figure that says so.

As in tasks/train/health.py the thresholds are wide: a run that leaves nothing to wish for is told nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.prepare.rows import FAULTS

STILL_FALLING = 0.01
"""Of the validation loss, since the validation before: more training would have gone on."""

MANY_CUT = 0.1
MANY_BAD = 0.05
FEW_VALIDATION_ROWS = 20
MUCH_ROOM = 0.4
"""Of the machine's memory: with less in use, larger settings would fit."""

LONG_S = 600.0
"""A shorter training is not worth a larger batch."""


def suggestions(facts: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """What the facts of a run suggest, the weightiest first.

    Args:
        facts: of `tasks.report.facts.facts_of`; sections that are missing suggest nothing.
        data: the data report.
    """
    training = facts.get("training", {})
    found = [
        *training.get("advice", []),
        *_chance(facts.get("evaluation", {})),
        *_forgetting(facts.get("evaluation", {})),
        *_still_falling(facts.get("progression", []), training, facts.get("settings", {})),
        *_cut_off(facts.get("evaluation", {})),
        *_data(data),
        *_room(training, facts.get("environment", {})),
    ]
    return list(dict.fromkeys(found))


def _chance(evaluation: Mapping[str, Any]) -> list[str]:
    line = _line(evaluation, "test_loss")
    if line is None or line["better"] is True:
        return []
    if line["better"] is False:
        return [
            f"The test loss is worse than the base model's ({line['base']} → {line['tuned']}): lower "
            "train.learning_rate, or look at 'tunesmith inspect' for what the rows teach."
        ]
    return [
        f"The change of the test loss ({line['change']}) may be chance: more test rows (data.test_share) "
        "would tell, more training rows or a higher train.rank may make it larger."
    ]


def _forgetting(evaluation: Mapping[str, Any]) -> list[str]:
    line = _line(evaluation, "general_loss")
    if line is None or line["better"] is not False:
        return []
    return [
        f"Forgetting: the loss on general texts rose ({line['base']} → {line['tuned']}). A lower "
        "train.learning_rate, fewer train.num_layers or general rows among the data keep more."
    ]


def _still_falling(
    progression: list[dict[str, Any]], training: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[str]:
    losses = [line["val_loss"] for line in progression]
    if len(losses) < 3 or losses[-1] > losses[-2] * (1 - STILL_FALLING):
        return []
    planned = "max_steps" if settings.get("train.max_steps") == training.get("steps") else "epochs"
    ended_by = training.get("ended_by") or planned
    return [
        f"Validation loss was still falling at the end ({losses[-2]:.3f} → {losses[-1]:.3f}): raise "
        f"train.{ended_by}, which ended the training."
    ]


def _cut_off(evaluation: Mapping[str, Any]) -> list[str]:
    line = _line(evaluation, "cut_off")
    share = _share(line["tuned"]) if line else None
    if share is None or share < MANY_CUT:
        return []
    return [f"{share:.0%} of the answers were cut off: raise evaluate.max_tokens to judge them whole."]


def _data(data: Mapping[str, Any]) -> list[str]:
    found = []
    if advice := data.get("guidance", {}).get("advice"):
        found.append(f"{advice[0].upper()}{advice[1:].rstrip('.')}.")
    reasons = data.get("reasons", {})
    read, bad = data.get("rows_read", 0), sum(reasons[kind]["rows"] for kind in FAULTS if kind in reasons)
    if read and bad / read > MANY_BAD:
        found.append(f"{bad:,} of {read:,} rows are bad: rejected.jsonl beside the data says where and why.")
    rows = data.get("splits", {}).get("valid", {}).get("rows")
    if rows is not None and rows < FEW_VALIDATION_ROWS:
        found.append(f"Only {rows} validation rows choose the best step: raise data.valid_share.")
    return found


def _room(training: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    memory_gb, peak_gb = environment.get("memory", ""), training.get("peak_memory", 0.0)
    total_gb = float(memory_gb.split()[0]) if memory_gb.endswith(" GB") else 0.0
    if not total_gb or training.get("seconds", 0) < LONG_S or peak_gb > MUCH_ROOM * total_gb:
        return []
    return [
        f"Peak memory was {peak_gb:.1f} of {total_gb:.0f} GB: 'tunesmith search' may try larger train.rank, "
        "train.num_layers or train.batch_size."
    ]


def _line(evaluation: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    return next((line for line in evaluation.get("lines", []) if line["name"] == name), None)


def _share(text: str) -> float | None:
    try:
        return float(text.removesuffix("%")) / 100
    except ValueError:
        return None
