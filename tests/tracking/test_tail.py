"""Following a growing file: every number once, in batches, across kills and rewinds."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.tracking.metrics import MetricsLog
from pipeline.tracking.tail import Point, TailState, points_of, read_batches
from tests.tracking.conftest import DERIVED, log_steps, logged_points


def drain(run: Path, state: TailState, limit: int = 1000) -> tuple[list[Point], TailState]:
    points: list[Point] = []
    for batch in read_batches(run / "metrics.jsonl", state, limit):
        points += batch.points
        # What is saved between two pushes is JSON.
        state = TailState.of(asdict(batch.state))
    return points, state


def as_rows(points: list[Point]) -> list[tuple[str, int, int, str]]:
    return sorted((p.key, p.step, p.time_ms, repr(p.value)) for p in points if not p.key.startswith(DERIVED))


def test_only_numbers_become_points() -> None:
    position = {"step": 2, "samples": 32, "epoch": 0.5, "time": 1.5}
    train = points_of({"kind": "train", **position, "loss": 0.25, "ok": True, "note": "x", "bins": [1], "none": None})
    assert sorted(train) == [
        ("train/epoch", 0.5, 1500, 2),
        ("train/loss", 0.25, 1500, 2),
        ("train/ok", 1.0, 1500, 2),
        ("train/samples", 32.0, 1500, 2),
    ]
    assert points_of({"kind": "system", **position, "cpu_percent": 7}) == [("system/cpu_percent", 7.0, 1500, 2)]
    assert points_of({"kind": "event", **position, "dropped": 3}) == []


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_every_number_once_while_the_file_grows(tmp_path: Path, limit: int) -> None:
    rng = random.Random(limit)
    log, state, seen, step = MetricsLog(tmp_path), TailState(), [], 0
    while step < 60:
        following = min(60, step + rng.randint(1, 9))
        log_steps(log, step + 1, following)
        log.log("system", cpu_percent=step)
        step = following
        points, state = drain(tmp_path, state, limit)
        seen += points
    assert as_rows(seen) == logged_points(tmp_path)
    assert drain(tmp_path, state) == ([], state)


def test_batches_keep_lines_whole_and_under_the_limit(tmp_path: Path) -> None:
    log_steps(MetricsLog(tmp_path), 1, 50)
    batches = list(read_batches(tmp_path / "metrics.jsonl", TailState(), 23))
    assert all(0 < len(batch.points) <= 23 for batch in batches)
    assert [batch.state.lines for batch in batches[:2]] == [4, 8]
    # Going on from any batch's state gives exactly what came after it.
    for i, batch in enumerate(batches):
        rest, _ = drain(tmp_path, batch.state)
        assert rest == [point for later in batches[i + 1 :] for point in later.points]


def test_a_torn_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log_steps(log, 1, 3)
    content = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(content[:-10])
    first, state = drain(tmp_path, TailState())
    assert {point.step for point in first} == {1, 2}
    (tmp_path / "metrics.jsonl").write_bytes(content)
    second, _ = drain(tmp_path, state)
    assert {point.step for point in second} == {3}


@pytest.mark.parametrize("uploaded", [5, 25, 30])
def test_after_a_rewind_no_step_comes_twice_and_none_is_missed(tmp_path: Path, uploaded: int) -> None:
    log = MetricsLog(tmp_path)
    log_steps(log, 1, uploaded)
    before, state = drain(tmp_path, TailState())
    log_steps(log, uploaded + 1, 30)
    for resumed, end in ((20, 28), (10, 40)):
        log.rewind(resumed)
        log_steps(log, resumed + 1, end)
        points, state = drain(tmp_path, state)
        before += points
    steps = sorted(point.step for point in before if point.key == "train/loss")
    assert steps == list(range(1, 41))
    assert sorted(p.step for p in before if p.key == "eval/top1") == [10, 20, 30, 40]
    # 40 steps of 16 samples are an epoch; its mean is that of the lines that are left.
    mean = pytest.approx(sum(1 / step for step in range(1, 41)) / 40)
    curves = [(p.key, p.step, p.value) for p in before if p.key in ("by_epoch/train/loss", "by_samples/train/loss")]
    assert sorted(curves) == [("by_epoch/train/loss", 1, mean), ("by_samples/train/loss", 640, mean)]
    assert [p.step for p in before if p.key == "by_epoch/eval/top1"] == [1]
    assert sorted(p.step for p in before if p.key == "by_samples/eval/top1") == [160, 320, 480, 640]


def test_a_rewind_of_lines_not_yet_read_leaves_no_trace(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log_steps(log, 1, 20)
    before, state = drain(tmp_path, TailState())
    log_steps(log, 21, 30)
    log.rewind(20)
    log_steps(log, 21, 25, factor=2.0)
    points, state = drain(tmp_path, state)
    assert as_rows(before + points) == logged_points(tmp_path)
    assert state.skip == {}
