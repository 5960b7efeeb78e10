"""What a person watching the run sees: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Prints for rank 0 and is silent elsewhere.

    Args:
        active: whether this process prints.
        total: steps of the run.
        unit: what a sample is.
    """

    def __init__(self, active: bool, total: int, unit: str = "img") -> None:
        self._active, self._total, self._unit = active, total, unit
        self._console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
        self._bar: Progress | None = None

    def begin(self, step: int) -> None:
        """Training starts after `step` steps; on a terminal the bar appears."""
        if self._active and sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("eta"), TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("training", total=self._total, completed=step)
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._active:
            self._console.print(text, markup=False)

    def step(self, step: int, epoch: float, lr: float, figures: dict[str, float]) -> None:
        """One line for a window of steps."""
        line = (
            f"step {step}/{self._total}  epoch {epoch:.2f}  loss {figures['loss']:.4f}  lr {lr:.3g}  "
            f"grad {figures['grad_norm']:.3g}  {figures['images_per_second']:.0f} {self._unit}/s  "
            f"wait {figures['data_wait']:.0%}"
        )
        if self._bar is not None:
            self._bar.update(self._task, description=line, completed=step)
        else:
            self.say(f"{line}  eta {_clock(figures['step_seconds'] * (self._total - step))}")

    def end(self) -> None:
        """Take the bar away; calling it again does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
