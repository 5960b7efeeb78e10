"""The rounds of population based training that are decided, and where a sweep that was killed goes on in them.

A round's take-overs are written down before any trial acts on them: some trials may have finished the next round when
the sweep is killed, while others have not yet begun it, or not yet taken over. Deciding again would need results that
may have changed by then, as when a trial that failed comes back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.sweep.milestones import Calendar
from launch.sweep.records import TAKEN_OVER, Records
from launch.sweep.take_over import is_taken
from pipeline.tracking.files import append_line, read_lines
from pipeline.train.again import newest_step

FILE = "rounds.jsonl"


def write_round(folder: Path, number: int, step: int, takes: dict[str, dict[str, Any]]) -> None:
    """Write down what a round has decided.

    Args:
        folder: of the sweep.
        step: at which its trials wait.
        takes: for each trial that takes over: its new `values`, and the `take_over` of its config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    append_line(folder / FILE, {"round": number, "step": step, "takes": takes})


def begun_round(records: Records, calendar: Calendar) -> int:
    """The round that the trials are in: the first that is not decided, and that no trial has gone beyond.

    No round waits for a trial that comes after the others, being new or having failed.
    """
    decided = _newest(records)
    length = next(iter(calendar.lengths.values()))  # of all
    ends = [(round(part.epochs * length.steps_per_epoch), part.time) for part in calendar.milestones]
    furthest = max(newest_step(records.path(record)) for record in records.all())
    return 1 + max(
        (number for end, number in ends if end < furthest or (decided is not None and end <= decided["step"])),
        default=0,
    )


def left_to_take(records: Records) -> dict[str, dict[str, Any]]:
    """What trials were told to take over and have not, by their names; see `write_round`."""
    decided = _newest(records)
    if decided is None:
        return {}
    left = {}
    for name, take in decided["takes"].items():
        record, source = records.get(name), take["take_over"]
        run = records.path(record)
        has_taken = any(is_taken(line, **source) for line in read_lines(run / TAKEN_OVER))
        # Under another scheduler it may have gone on meanwhile, from its own weights.
        if not (has_taken or record.is_over or newest_step(run) > source["step"]):
            left[name] = take
    return left


def _newest(records: Records) -> dict[str, Any] | None:
    lines = read_lines(records.folder / FILE)
    return lines[-1] if lines else None
