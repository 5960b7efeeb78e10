"""The learning rate as a function of the samples seen.

NesT (official `train.py`): with e the epochs seen *after* the step, E all of them and w the warm-up,
lr(e) = peak * min(1, e / w) * (1 + cos(pi * max(0, e - w) / (E - w))) / 2. Counting in epochs, steps or samples gives
the same value, since the ratios are the same; nothing depends on how often a run was stopped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up from 0 to `peak`, then half a cosine down to `floor`.

    Attributes:
        peak: learning rate after the warm-up.
        floor: learning rate at the end.
        warmup_steps: length of the warm-up, in global steps.
        total_steps: length of the run, in global steps.
    """

    peak: float
    floor: float
    warmup_steps: int
    total_steps: int

    def lr(self, step: int) -> float:
        """Learning rate of global step `step`, counted from 0 (the first step already has a rate above 0)."""
        done = step + 1
        warmup = min(1.0, done / self.warmup_steps) if self.warmup_steps else 1.0
        falling = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, max(0, done - self.warmup_steps) / falling)
        return warmup * (self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)))
