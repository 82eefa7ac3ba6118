"""What the curves tell: each fault is told by the histories that have it and by no other."""

from __future__ import annotations

import math

import pytest

from tasks.train.health import advice, divergence, overfitting, plateau

Points = list[tuple[int, dict[str, float]]]


def history(train: list[float], val: dict[int, float]) -> Points:
    """Training losses of step 1, 2, …, and validation losses by step."""
    points: Points = [(0, {"val_loss": val[0]})]
    points += [(step, {"train_loss": loss}) for step, loss in enumerate(train, start=1)]
    for step, loss in val.items():
        points[step][1]["val_loss"] = loss
    return points


def falling(steps: int, start: float = 3.0, end: float = 1.0) -> list[float]:
    """With the noise of batches: every other one 20% higher."""
    curve = [end + (start - end) * math.exp(-4 * step / steps) for step in range(steps)]
    return [loss * (1.1 if step % 2 else 0.9) for step, loss in enumerate(curve)]


HEALTHY = history(falling(200), {0: 3.2, 40: 2.4, 80: 2.0, 120: 1.8, 160: 1.7, 200: 1.66})
OVERFIT = history(falling(200), {0: 3.2, 40: 2.4, 80: 2.0, 120: 2.1, 160: 2.3, 200: 2.6})
FLAT = history(falling(200), {0: 3.2, 40: 2.4, 80: 2.0, 120: 1.999, 160: 1.998, 200: 1.998})
DIVERGED = history(falling(200)[::-1], {0: 3.2, 40: 3.0, 80: 3.3, 120: 3.6, 160: 4.0, 200: 5.0})


@pytest.mark.parametrize(
    ("points", "word"),
    [(HEALTHY, None), (OVERFIT, "Overfitting"), (FLAT, "Plateau"), (DIVERGED, "Divergence")],
    ids=["healthy", "overfit", "flat", "diverged"],
)
def test_each_fault_is_told_once_and_a_healthy_run_is_told_nothing(points: Points, word: str | None) -> None:
    assert [told.split(":")[0] for told in advice(points)] == ([word] if word else [])


def test_a_sentence_gives_figures_and_names_settings_that_exist() -> None:
    from tasks.config import flatten, load_settings

    known = flatten(load_settings())
    told = [*advice(OVERFIT), *advice(FLAT), *advice(DIVERGED)]
    assert "2.000 at step 80 to 2.600 at step 200" in told[0]
    for sentence in told:
        words = [word.strip(".,;") for word in sentence.split() if word.startswith("train.")]
        assert words
        assert set(words) <= known.keys()


def test_a_rise_of_validation_within_its_noise_is_no_overfitting() -> None:
    assert overfitting(history(falling(200), {0: 3.2, 80: 2.0, 200: 2.03})) is None
    assert overfitting(history(falling(200), {0: 3.2, 80: 2.0, 200: 2.05}))


def test_validation_that_rises_with_training_loss_is_no_overfitting() -> None:
    assert overfitting(DIVERGED) is None


def test_a_few_steps_and_a_few_validations_are_not_judged() -> None:
    assert divergence(history(falling(99)[::-1], {0: 3.0})) is None
    assert plateau(history(falling(100), {0: 3.0, 50: 2.0, 100: 2.0})) is None
    assert overfitting(history(falling(100), {0: 3.0, 100: 4.0})) is None


def test_batch_noise_without_a_trend_is_no_divergence() -> None:
    assert divergence(history([2.2 if step % 2 else 1.8 for step in range(200)], {0: 2.0})) is None
