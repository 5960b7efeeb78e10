"""What a run carries from step to step."""

from __future__ import annotations

from pipeline.train.state import State


def test_streaks_of_skipped_steps_go_on_over_windows() -> None:
    state = State()
    longest = [state.note_skipped(steps) for steps in ([], [3, 4], [5], [], [7, 9, 10, 11, 15], [16])]
    assert longest == [0, 2, 3, 0, 3, 2]
    assert state.skipped == 9
