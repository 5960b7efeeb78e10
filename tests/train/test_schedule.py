"""The learning rates of the papers' code: formulas evaluated independently, printed tables, timm's own scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler

from pipeline.config_load import load_config
from pipeline.resolve import make_schedule
from pipeline.train.plan import Plan
from pipeline.train.schedule import CosineSchedule

CONFIGS = Path(__file__).parents[2] / "configs"
IMAGENET, CIFAR = 1_281_167, 50_000


def recipe_schedule(recipe: str, samples: int, *overrides: str) -> tuple[CosineSchedule, int]:
    """Schedule of a recipe on a split of that many samples, and the steps of an epoch."""
    config = load_config(CONFIGS / recipe, overrides)
    steps = samples // config.train.global_batch_size
    return make_schedule(config, Plan.of(config, steps)), steps


# --- NesT: per step


def nest(step_from_one: int, base: float, steps_per_epoch: int, warmup_epochs: float, epochs: float) -> float:
    e = step_from_one / steps_per_epoch
    cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, (e - warmup_epochs) / (epochs - warmup_epochs))))
    return base * cosine * min(1.0, e / warmup_epochs)


@pytest.mark.parametrize(
    ("recipe", "samples", "base", "steps_per_epoch", "warmup", "epochs"),
    [
        ("nest/tiny_imagenet.yaml", IMAGENET, 1e-3, 1251, 20, 300),
        ("nest/base_imagenet_100ep.yaml", IMAGENET, 1e-3, 1251, 20, 100),
        ("nest/tiny_cifar10.yaml", CIFAR, 1.875e-4, 260, 5, 300),
        ("nest/small_cifar100.yaml", CIFAR, 1.25e-4, 390, 5, 300),
        ("nest/base_cifar10.yaml", CIFAR, 6.25e-5, 781, 5, 300),
    ],
)
def test_nest(recipe: str, samples: int, base: float, steps_per_epoch: int, warmup: int, epochs: int) -> None:
    schedule, steps = recipe_schedule(recipe, samples)
    assert steps == steps_per_epoch
    total, start = epochs * steps, warmup * steps
    for step in (0, 1, 100, start - 1, start, start + 1, total // 2, total - 2):
        expected = nest(step + 1, base, steps, warmup, epochs)
        assert schedule.lr(step) == pytest.approx(expected, rel=1e-9, abs=1e-18)
    # lr(1), lr(w), the middle of the cosine, lr(E)
    assert schedule.lr(0) == pytest.approx(base / start, rel=1e-12)
    assert schedule.lr(start - 1) == base
    assert schedule.lr((start + total) // 2 - 1) == pytest.approx(base / 2, rel=1e-4)
    assert schedule.lr(total - 1) == pytest.approx(0.0, abs=1e-18)


@pytest.mark.parametrize(("warmup", "total"), [(20 * 1251, 300 * 1251), (5 * 260, 300 * 260), (0, 1000), (4, 24)])
def test_nest_never_changes(warmup: int, total: int) -> None:
    """Bits, not digits, in this order of operations: a run that was started earlier goes on as it began."""
    schedule = CosineSchedule(1e-3, 0.0, total, warmup)
    for step in {*range(0, total, max(1, total // 500)), max(0, warmup - 1), warmup, total - 1}:
        progress = min(1.0, max(0, step + 1 - warmup) / (total - warmup))
        ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
        assert schedule.lr(step) == ramp * (1e-3 * 0.5 * (1 + math.cos(math.pi * progress)))


# --- timm's scheduler: per epoch


def hvt(epoch: int, base: float) -> float:
    """DeiT and HVT, epochs counted from 0: the scheduler is stepped with the epoch just done."""
    t = max(0, epoch - 1)
    if t < 5:
        return 1e-6 + t * (base - 1e-6) / 5
    return 1e-5 + 0.5 * (base - 1e-5) * (1 + math.cos(math.pi * t / 300))


def refiner(epoch: int, base: float) -> float:
    """Refiner: stepped with the epoch to come; 300 epochs of cosine, 10 of cool-down."""
    if epoch < 5:
        return 1e-6 + epoch * (base - 1e-6) / 5
    return 1e-5 + 0.5 * (base - 1e-5) * (1 + math.cos(math.pi * epoch / 300)) if epoch < 300 else 1e-5


def constant(epoch: int, base: float) -> float:
    return base


PER_EPOCH: list[Any] = [
    # recipe, samples, steps per epoch, peak, epochs, formula
    ("hvt/s_1_imagenet.yaml", IMAGENET, 1251, 1e-3, 300, hvt),
    ("hvt/s_1_cifar100.yaml", CIFAR, 195, 2.5e-4, 300, hvt),
    ("hvt/s_1_cifar100_b128.yaml", CIFAR, 390, 1.25e-4, 300, hvt),
    ("hvt/s_1_cifar100_b1024.yaml", CIFAR, 48, 1e-3, 300, hvt),
    ("deit/small_imagenet.yaml", IMAGENET, 1251, 1e-3, 300, hvt),
    ("refiner/s_imagenet.yaml", IMAGENET, 2502, 5e-4, 310, refiner),
    ("refiner/s_imagenet_384.yaml", IMAGENET, 2502, 5e-6, 30, constant),
]


@pytest.mark.parametrize(("recipe", "samples", "steps_per_epoch", "peak", "epochs", "formula"), PER_EPOCH)
def test_rate_of_every_epoch(
    recipe: str, samples: int, steps_per_epoch: int, peak: float, epochs: int, formula: Callable[[int, float], float]
) -> None:
    schedule, steps = recipe_schedule(recipe, samples)
    assert (steps, schedule.total_steps, schedule.peak) == (steps_per_epoch, epochs * steps_per_epoch, peak)
    for epoch in range(epochs):
        rates = {schedule.lr(epoch * steps + within) for within in (0, 1, steps // 2, steps - 1)}
        assert len(rates) == 1, f"the rate changes within epoch {epoch}"
        assert rates.pop() == pytest.approx(formula(epoch, peak), rel=1e-9)


def test_hvt_table() -> None:
    """The figures that HVT's code prints at a base rate of 1e-3, to their five digits."""
    printed = {
        0: 1e-6, 1: 1e-6, 2: 2.008e-4, 3: 4.006e-4, 4: 6.004e-4, 5: 8.002e-4, 6: 9.9932e-4,
        100: 7.5698e-4, 150: 5.1018e-4, 200: 2.6200e-4, 299: 1.0109e-5,
    }  # fmt: skip
    schedule, steps = recipe_schedule("hvt/s_1_imagenet.yaml", IMAGENET)
    assert {epoch: float(f"{schedule.lr(epoch * steps):.4e}") for epoch in printed} == pytest.approx(printed, rel=1e-12)


def timm_rates(lr: float, epochs: int, step_with: int) -> list[float]:
    """Rates of a loop that steps timm's scheduler after each epoch, with that epoch (0) or the next one (1)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = CosineLRScheduler(optimizer, 300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6, cycle_limit=1)
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + step_with)
    return rates


@pytest.mark.parametrize(
    ("recipe", "peak", "epochs", "step_with"),
    [("hvt/s_1_imagenet.yaml", 1e-3, 300, 0), ("refiner/s_imagenet.yaml", 5e-4, 310, 1)],
)
def test_equals_timm(recipe: str, peak: float, epochs: int, step_with: int) -> None:
    schedule, steps = recipe_schedule(recipe, IMAGENET)
    ours = [schedule.lr(epoch * steps) for epoch in range(epochs)]
    assert ours == pytest.approx(timm_rates(peak, epochs, step_with), rel=1e-9, abs=0)
    assert ours != pytest.approx(timm_rates(peak, epochs, 1 - step_with), rel=1e-3, abs=0)


# --- the parts by themselves


def test_floor_and_no_warmup() -> None:
    schedule = CosineSchedule(1.0, 0.1, 100)
    assert schedule.lr(49) == pytest.approx(0.55)
    assert schedule.lr(99) == pytest.approx(0.1)


def test_warmup_starts_from_its_own_rate() -> None:
    schedule = CosineSchedule(1.0, 0.0, 100, warmup_steps=4, warmup_lr=0.2)
    assert [schedule.lr(step) for step in range(4)] == pytest.approx([0.4, 0.6, 0.8, 1.0])


def test_cooldown_is_the_last_part() -> None:
    schedule = CosineSchedule(1.0, 0.1, 100, warmup_steps=10, cooldown_steps=30)
    assert schedule.lr(39) == pytest.approx(0.55)  # half of the 60 steps in between
    assert [schedule.lr(step) for step in range(69, 100)] == pytest.approx([0.1] * 31)
    assert schedule.lr(68) > 0.1


def test_delay_shifts_everything() -> None:
    late = CosineSchedule(1.0, 0.0, 100, warmup_steps=10, delay_steps=7)
    prompt = CosineSchedule(1.0, 0.0, 100, warmup_steps=10)
    assert [late.lr(step) for step in range(7)] == [0.0] * 7
    assert [late.lr(step + 7) for step in range(93)] == [prompt.lr(step) for step in range(93)]


def test_lengths_in_fractions_of_an_epoch() -> None:
    """2.5 epochs of 7 steps are 18 (17.5 rounded to even); by epoch the curve is read where each epoch begins."""
    overrides = ("train.epochs=9.5", "optim.schedule.warmup=2.5ep", "train.global_batch_size=7", "optim.lr_batch=7")
    schedule, steps = recipe_schedule("hvt/s_1_imagenet.yaml", 50, *overrides, "optim.schedule.delay=0ep")
    assert (steps, schedule.warmup_steps, schedule.total_steps) == (7, 18, 66)
    rates = [schedule.lr(step) for step in range(66)]
    assert rates[0] == rates[6] == 1e-6
    assert rates[7] == rates[13] == pytest.approx(1e-6 + (5e-4 - 1e-6) * 7 / 18)
    assert rates[14] == rates[20] == pytest.approx(1e-6 + (5e-4 - 1e-6) * 14 / 18)
    assert rates[21] == pytest.approx(1e-5 + (5e-4 - 1e-5) * 0.5 * (1 + math.cos(math.pi * 21 / 66)))
    # The tenth epoch is half an epoch long.
    assert rates[63] == rates[65] > 1e-5


def test_a_run_below_one_epoch_keeps_its_first_rate() -> None:
    schedule = CosineSchedule(1.0, 0.0, 5, by="epoch", cosine="from_start", epoch_steps=8)
    assert [schedule.lr(step) for step in range(5)] == [1.0] * 5
