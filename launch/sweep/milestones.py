"""Where the run of a trial is cut into parts, for schedulers that let trials wait for each other.

A part ends as `train.stop_after` ends a run: evaluated and saved at exactly that step. So what a scheduler judges, and
what another trial takes over, is what was measured.
"""

from __future__ import annotations

from math import floor, log
from typing import NamedTuple

from launch.sweep.config import Asha, Fifo, Hyperband, Median, Pbt
from pipeline.durations import Duration
from pipeline.errors import UserError


class Length(NamedTuple):
    """The length of a trial's run, in global steps."""

    end_step: int
    steps_per_epoch: int

    @property
    def epochs(self) -> float:
        return self.end_step / self.steps_per_epoch


class Calendar(NamedTuple):
    """When trials end and are judged.

    Attributes:
        lengths: of the runs of the trials that are known, by name.
        milestones: where runs wait for the scheduler, in epochs.
        epochs: of the longest trial.
    """

    lengths: dict[str, Length]
    milestones: list[Milestone]
    epochs: float


class Milestone(NamedTuple):
    """The end of a part.

    Attributes:
        epochs: since the beginning of the run.
        time: what the scheduler calls it: rounds done, or shortest lengths.
    """

    epochs: float
    time: int


def milestones(scheduler: Fifo | Asha | Hyperband | Median | Pbt, epochs: float) -> list[Milestone]:
    """The milestones of a run of so many epochs, its end left out.

    Raises:
        UserError: the run is too short for the scheduler's own lengths.
    """
    if isinstance(scheduler, Pbt):
        every = in_epochs(scheduler.every, "scheduler.every", epochs)
        rounds = floor(epochs / every + 1e-6)
        return [m for m in (Milestone(k * every, k) for k in range(1, rounds + 1)) if m.epochs < epochs - 1e-6]
    if isinstance(scheduler, Hyperband):
        halvings = hyperband_halvings(scheduler, epochs)
        shortest = epochs / scheduler.factor**halvings
        return [Milestone(shortest * scheduler.factor**k, scheduler.factor**k) for k in range(halvings)]
    if not isinstance(scheduler, Fifo):
        in_epochs(scheduler.grace, "scheduler.grace", epochs)
    return []


def hyperband_halvings(scheduler: Hyperband, epochs: float) -> int:
    """How often the shortest trials of a run of so many epochs are judged."""
    grace = in_epochs(scheduler.grace, "scheduler.grace", epochs)
    return floor(log(epochs / grace) / log(scheduler.factor) + 1e-6)


def in_epochs(duration: Duration, key: str, most: float) -> float:
    """A scheduler's length.

    Raises:
        UserError: not counted in epochs, or longer than the run.
    """
    if duration.unit != "ep":
        raise UserError(f"{key}={duration}: trials are compared at equal epochs; write it in epochs, such as 5ep")
    if duration.value > most:
        raise UserError(f"{key}={duration} is longer than the trials, which have {most:.4g} epochs; shorten it")
    return duration.value
