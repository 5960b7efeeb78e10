"""The learning rate of every global step: linear warm-up, half a cosine, cool-down.

Two families of training code are reproduced exactly.

NesT (official `train.py`) counts the samples seen *after* the step: with e epochs seen, E in all and w of warm-up,
lr(e) = peak * min(1, e / w) * (1 + cos(pi * max(0, e - w) / (E - w))) / 2. Counting in epochs, steps or samples gives
the same value, since the ratios are the same.

timm's `CosineLRScheduler` (DeiT, HVT, Refiner) keeps one rate for the whole of epoch t, counted from 0, and lets the
cosine begin with the run, hidden by the warm-up: g(t) = warmup_lr + t / w * (peak - warmup_lr) for t < w, then
floor + (peak - floor) * (1 + cos(pi * t / T)) / 2, and floor from T on. Refiner's `main.py`, like timm's own
`train.py`, steps the scheduler with the epoch to come: lr(t) = g(t), with T = 300 and 10 epochs of cool-down. DeiT's
and HVT's step it with the epoch just done, so that everything comes one epoch late: lr(t) = g(max(0, t - 1)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CosineSchedule:
    """Learning rates from `warmup_lr` up to `peak`, then along half a cosine down to `floor`, and on at `floor`.

    All lengths are whole global steps. An epoch is a whole number of them, the remainder of the samples being left out;
    a length in fractions of an epoch was rounded to the nearest step before it comes here. With `by="epoch"` the curve
    is read where an epoch begins, so a length that ends inside an epoch takes effect from the next one on, and a run
    shorter than an epoch keeps its first rate.

    Attributes:
        peak: rate that the warm-up leads to.
        floor: rate at the end.
        total_steps: length of the run.
        warmup_steps: length of the linear warm-up.
        warmup_lr: rate that the warm-up starts from.
        cooldown_steps: last part of the run, at `floor`.
        delay_steps: everything comes this much later; the curve's first rate holds until then.
        by: `step`: a new rate for every step, from the steps done after it, so that even the first is above
            `warmup_lr`; `epoch`: one for each epoch, from the steps done before it.
        cosine: `after_warmup`: the cosine begins where the warm-up ends; `from_start`: with the run.
        epoch_steps: steps in an epoch.
    """

    peak: float
    floor: float
    total_steps: int
    warmup_steps: int = 0
    warmup_lr: float = 0.0
    cooldown_steps: int = 0
    delay_steps: int = 0
    by: Literal["step", "epoch"] = "step"
    cosine: Literal["after_warmup", "from_start"] = "after_warmup"
    epoch_steps: int = 1

    def lr(self, step: int) -> float:
        """Learning rate of global step `step`, counted from 0."""
        done = step + 1 if self.by == "step" else step - step % self.epoch_steps
        return self._curve(max(0, done - self.delay_steps))

    def _curve(self, done: int) -> float:
        if done < self.warmup_steps:
            return self.warmup_lr + (self.peak - self.warmup_lr) * (done / self.warmup_steps)
        start = self.warmup_steps if self.cosine == "after_warmup" else 0
        falling = max(1, self.total_steps - self.cooldown_steps - start)
        progress = min(1.0, (done - start) / falling)
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
