"""Follows a growing `metrics.jsonl` and yields each measurement once, also after the run was killed and resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.tracking.curves import CurveState, Point, curve_points
from pipeline.tracking.files import parse_line

# MLflow has a page of its own for metrics whose names begin with "system/".
PREFIX = {"train": "train/", "eval": "eval/", "system": "system/"}
_MARK_BYTES = 512


@dataclass(frozen=True)
class TailState:
    """How far a file was read; plain values, so it can be saved as JSON.

    Attributes:
        offset: bytes read.
        mark: hash of the bytes just before `offset`; another one there means that the file was rewound.
        newest: per metric, the largest step yielded.
        skip: per metric, the step up to which values were yielded before a rewind.
        lines: measurement lines yielded.
        curves: of the epoch that is not over.
    """

    offset: int = 0
    mark: str = ""
    newest: dict[str, int] = field(default_factory=dict)
    skip: dict[str, int] = field(default_factory=dict)
    lines: int = 0
    curves: CurveState = field(default_factory=CurveState)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> TailState:
        """From what `dataclasses.asdict` made of one."""
        return cls(**{**saved, "curves": CurveState(**saved.get("curves", {}))})


@dataclass(frozen=True)
class Batch:
    """Points, and the state that is true once they are stored."""

    points: list[Point]
    state: TailState


def points_of(line: dict[str, Any]) -> list[Point]:
    """The numbers on one line. Events, text and lists give none; NaN and infinities are numbers.

    Keys get the prefix of the line's kind. Lines of "train" and "eval" also give `samples` and `epoch`, so that curves
    can be drawn over either.
    """
    prefix = PREFIX.get(line["kind"])
    if prefix is None:
        return []
    position = {"kind", "step", "time"} | ({"samples", "epoch"} if line["kind"] == "system" else set())
    time_ms = int(line["time"] * 1000)
    return [
        Point(prefix + key, float(value), time_ms, line["step"])
        for key, value in line.items()
        if key not in position and isinstance(value, int | float)
    ]


def read_batches(path: Path, state: TailState, limit: int = 1000) -> Iterator[Batch]:
    """Everything that `state` hasn't seen, in file order, at most `limit` points at a time.

    A line's own points are followed by those of the curves that it completes. A line is never split over two batches
    unless it alone has more points than `limit`. A torn last line waits until it is whole. After a rewind, the steps
    that were yielded before are left out: a server can't take points back.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        start = _after_rewind(file, state)
        offset, lines, newest, curves = start.offset, start.lines, dict(start.newest), start.curves
        recent = _before(file, offset)
        points: list[Point] = []

        def batch() -> Batch:
            return Batch(points, TailState(offset, _hash(recent), dict(newest), start.skip, lines, curves))

        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            line = parse_line(raw)
            derived, after = ([], curves) if line is None else curve_points(line, curves)
            every = [] if line is None else points_of(line) + derived
            new = [p for p in every if p.step > start.skip.get(p.key, -1)]
            if points and len(points) + len(new) > limit:
                yield batch()
                points = []
            points += new
            curves = after
            newest |= {p.key: max(p.step, newest.get(p.key, -1)) for p in new}
            offset, lines, recent = offset + len(raw), lines + bool(new), (recent + raw)[-_MARK_BYTES:]
        if offset != state.offset:
            yield batch()


def _after_rewind(file: Any, state: TailState) -> TailState:
    """The state to go on from: unchanged, or the file's beginning with all that was yielded to be skipped."""
    if not state.offset or _hash(_before(file, state.offset)) == state.mark:
        return state
    return TailState(newest=state.newest, skip=dict(state.newest), lines=state.lines)


def _before(file: Any, offset: int) -> bytes:
    start = max(0, offset - _MARK_BYTES)
    file.seek(start)
    return bytes(file.read(offset - start))


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
