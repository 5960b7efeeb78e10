"""What the loop carries from step to step, besides the engine's tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class Best(NamedTuple):
    """Which figure of an evaluation tells the best weights, and where its best values lie."""

    figure: str = "top1"
    goal: Literal["max", "min"] = "max"

    def improves(self, figures: dict[str, float], before: dict[str, float]) -> bool:
        """Whether figures beat earlier ones; a NaN never does, and everything else beats a NaN."""
        new, old = figures[self.figure], before[self.figure]
        if math.isnan(old):
            return not math.isnan(new)
        return new > old if self.goal == "max" else new < old


@dataclass
class State:
    """Saved as JSON with every checkpoint.

    Attributes:
        step: global steps done. The samples seen, the epoch and the position in the data all follow from it.
        last: figures of the newest evaluation, with its step.
        best: figures of the best evaluation, with its step.
        skipped: steps without an update because a gradient was NaN or infinite.
        streak: how many of them in a row end with the last one.
        last_skipped: number of the last one, counted from 0; -2: none yet.
        seconds: time spent training, over all starts.
        losses: mean losses of the newest windows of the log, for `spikes`.
        rollbacks: for each, the step of the checkpoint that was loaded again, and the step at which.
    """

    step: int = 0
    last: dict[str, float] | None = None
    best: dict[str, float] | None = None
    skipped: int = 0
    streak: int = 0
    last_skipped: int = -2
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    rollbacks: list[tuple[int, int]] = field(default_factory=list)

    def note_skipped(self, steps: list[int]) -> int:
        """Keep which steps were skipped, in rising order; returns the longest streak that they make or end."""
        longest = 0
        for step in steps:
            self.streak = self.streak + 1 if step == self.last_skipped + 1 else 1
            self.last_skipped = step
            longest = max(longest, self.streak)
        self.skipped += len(steps)
        return longest

    def note(self, figures: dict[str, float], best: Best = Best()) -> None:  # noqa: B008  (immutable)
        """Keep the figures of an evaluation at this step; as the best, too, when no earlier one was as good."""
        self.last = {"step": self.step, **figures}
        if self.best is None or best.improves(figures, self.best):
            self.best = self.last
