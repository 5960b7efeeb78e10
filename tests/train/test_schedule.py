"""The learning rate against the formula of NesT's official code, evaluated independently."""

from __future__ import annotations

import math

import pytest

from pipeline.train.schedule import CosineSchedule


def official(step_from_one: int, base: float, steps_per_epoch: int, warmup_epochs: float, epochs: float) -> float:
    e = step_from_one / steps_per_epoch
    cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, (e - warmup_epochs) / (epochs - warmup_epochs))))
    return base * cosine * min(1.0, e / warmup_epochs)


@pytest.mark.parametrize(
    ("base", "steps_per_epoch", "warmup", "epochs"),
    [(1e-3, 1251, 20, 300), (1e-3, 1251, 20, 100), (1.875e-4, 260, 5, 300)],
)
def test_equals_the_official_formula(base: float, steps_per_epoch: int, warmup: int, epochs: int) -> None:
    total = epochs * steps_per_epoch
    schedule = CosineSchedule(base, 0.0, warmup * steps_per_epoch, total)
    for step in (0, 1, 100, warmup * steps_per_epoch - 1, warmup * steps_per_epoch, total // 2, total - 2):
        assert schedule.lr(step) == pytest.approx(
            official(step + 1, base, steps_per_epoch, warmup, epochs), rel=1e-9, abs=1e-18
        )


def test_landmarks() -> None:
    schedule = CosineSchedule(1e-3, 0.0, 20 * 1251, 300 * 1251)
    assert schedule.lr(0) == pytest.approx(1e-3 / (20 * 1251), rel=1e-12)
    assert schedule.lr(20 * 1251 - 1) == 1e-3
    assert schedule.lr(300 * 1251 - 1) == pytest.approx(0.0, abs=1e-15)
    assert schedule.lr(160 * 1251 - 1) == pytest.approx(0.5e-3, rel=1e-9)


def test_floor_and_no_warmup() -> None:
    schedule = CosineSchedule(1.0, 0.1, 0, 100)
    assert schedule.lr(49) == pytest.approx(0.55)
    assert schedule.lr(99) == pytest.approx(0.1)
