"""What a run carries from step to step."""

from __future__ import annotations

import math
from typing import Literal

import pytest

from pipeline.train.state import Best, State


@pytest.mark.parametrize(
    ("goal", "values", "best"),
    [
        ("max", [0.5, 0.7, 0.6], 0.7),
        ("min", [0.5, 0.7, 0.4], 0.4),
        ("max", [math.nan, 0.1, math.nan, 0.2], 0.2),
        ("min", [math.nan, 0.2, math.nan], 0.2),
    ],
)
def test_the_best_is_never_a_nan_that_was_beaten(goal: Literal["max", "min"], values: list[float], best: float) -> None:
    state = State()
    for value in values:
        state.note({"loss": value}, Best("loss", goal))
    assert state.best is not None and state.best["loss"] == best


def test_streaks_of_skipped_steps_go_on_over_windows() -> None:
    state = State()
    longest = [state.note_skipped(steps) for steps in ([], [3, 4], [5], [], [7, 9, 10, 11, 15], [16])]
    assert longest == [0, 2, 3, 0, 3, 2]
    assert state.skipped == 9
