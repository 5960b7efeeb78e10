"""metrics.jsonl: values come back, a kill costs at most the last line, a rewind forgets what is measured again."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.tracking.metrics import MetricsLog, read_metrics
from tests.tracking.conftest import log_steps, wait_for


def test_lines_come_back_with_their_position(tmp_path: Path) -> None:
    before = time.time()
    log = MetricsLog(tmp_path)
    log.log("train", 3, samples=48, epoch=0.075, loss=2.5, note="warm-up", bins=[1, 2])
    log.log("system", cpu_percent=50)
    log.log("event", 4, event="loss is not finite")
    log.close()
    train, system, event = read_metrics(tmp_path)
    assert before <= train.pop("time") <= time.time()
    assert train == {
        "kind": "train",
        "step": 3,
        "samples": 48,
        "epoch": 0.075,
        "loss": 2.5,
        "note": "warm-up",
        "bins": [1, 2],
    }
    assert (system["step"], system["samples"], system["epoch"], system["cpu_percent"]) == (3, 48, 0.075, 50)
    assert (event["step"], event["samples"], event["event"]) == (4, 48, "loss is not finite")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.1, -0.0, 5e-324, 1.7976931348623157e308])
@pytest.mark.parametrize("wrap", [float, np.float64, lambda v: torch.tensor(v, dtype=torch.float64)])
def test_floats_come_back_exactly_and_the_file_stays_json(tmp_path: Path, value: float, wrap: type) -> None:
    log = MetricsLog(tmp_path)
    log.log("train", 1, loss=wrap(value), nested=[value])
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (line,) = read_metrics(tmp_path)
    assert repr(line["loss"]) == repr(value)
    assert repr(line["nested"]) == repr([value])


@pytest.mark.parametrize(
    ("kind", "values"), [("trian", {}), ("train", {"time": 1.0}), ("train", {"kind2": 1, "time": 2})]
)
def test_wrong_kinds_and_reserved_names_are_refused(tmp_path: Path, kind: str, values: dict[str, float]) -> None:
    log = MetricsLog(tmp_path)
    with pytest.raises(ValueError):
        log.log(kind, 1, **values)  # type: ignore[arg-type]
    assert read_metrics(tmp_path) == []


def test_rewind_drops_what_comes_after_and_keeps_events(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log_steps(log, 1, 30)
    log.log("event", 29, event="preempted")
    log.log("system", cpu_percent=10)
    before = read_metrics(tmp_path)
    dropped = log.rewind(20)
    assert dropped == 10 + 1 + 1
    after = read_metrics(tmp_path)
    kept = [line for line in before if line["kind"] == "event" or line["step"] <= 20]
    assert after[:-1] == kept
    assert after[-1]["event"] == "rewind"
    assert (after[-1]["step"], after[-1]["samples"], after[-1]["dropped"]) == (20, 320, 12)
    assert after[-1]["last_time"] == before[-1]["time"]
    log_steps(log, 21, 30)
    again = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert [line["step"] for line in again] == list(range(1, 31))


def test_rewind_to_the_end_changes_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log_steps(log, 1, 5)
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert log.rewind(5) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == content
    log.log("system", cpu_percent=1.0)
    assert read_metrics(tmp_path)[-1]["samples"] == 80


@pytest.mark.parametrize("tail", [b'{"kind":"train","st', b"\0" * 4096, b"\0" * 70_000 + b"\n", b'{"kind":"train"}'])
def test_a_torn_tail_is_ignored_and_then_cut(tmp_path: Path, tail: bytes) -> None:
    log = MetricsLog(tmp_path)
    log_steps(log, 1, 3)
    log.close()
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + tail)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    log = MetricsLog(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    log_steps(log, 4, 4)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_damage_before_the_last_line_is_reported_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind":"train","step":1}\nbroken\n{"kind":"train","step":2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not JSON"):
        read_metrics(tmp_path)


_FILLER = """
import resource, sys
from pipeline.tracking.metrics import MetricsLog
log = MetricsLog(sys.argv[1])
for limit in (1000, resource.RLIM_INFINITY):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for step in range(100):
        log.log("train", step + 1, loss=1.0)
    content = log.path.read_bytes()
    print(len(content), content.count(b"\\n"), content.endswith(b"\\n"))
resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) + 10, resource.RLIM_INFINITY))
log.log("train", 300, loss=1.0)
log.close()
"""


def test_without_space_nothing_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stays as it was, and open: what a closed descriptor's number stands for next is another file."""
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.log("train", step, loss=1.0)
    before = log.path.read_bytes()

    def full(*arguments: object) -> None:
        raise UserError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.tracking.metrics.write_aside", full)
        with pytest.raises(UserError, match="no space"):
            log.rewind(1)
    other = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    log.log("train", 4, loss=1.0)
    log.close()
    os.close(other)
    assert log.path.read_bytes().startswith(before)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "other").read_bytes() == b""


def test_lines_wait_for_space(tmp_path: Path) -> None:
    """A limit on the file's size stands in for a full disk: a write that is cut short, then those that are refused."""
    done = subprocess.run([sys.executable, "-c", _FILLER, str(tmp_path)], capture_output=True, text=True, check=True)
    full, free = (line.split() for line in done.stdout.splitlines())
    assert 900 < int(full[0]) <= 1000 and 0 < int(full[1]) < 100 and full[2] == "True"
    assert free[1:] == ["200", "True"]
    assert [line["step"] for line in read_metrics(tmp_path)] == [*range(1, 101), *range(1, 101)]
    warnings = done.stderr.splitlines()
    assert len(warnings) == 3
    assert all("can't be written" in line and "wait in memory" in line for line in warnings[:2])
    assert "lacks its last 1 lines" in warnings[2]


def test_threads_never_mix_their_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    threads = [threading.Thread(target=log_steps, args=(log, 1, 200, k)) for k in (1.0, 2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    losses = sorted(line["loss"] for line in read_metrics(tmp_path) if line["kind"] == "train")
    assert losses == sorted(k / step for k in (1.0, 2.0, 3.0) for step in range(1, 201))


_LOGGER = """
import sys
from pipeline.tracking.metrics import MetricsLog
log = MetricsLog(sys.argv[1])
step = 0
while True:
    step += 1
    log.log("train", step, samples=16 * step, epoch=step / 40, loss=1 / step, text="x" * (step % 3000))
"""


@pytest.mark.chaos
def test_killed_at_random_moments_nothing_torn_is_trusted(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(8):
        size = (tmp_path / "metrics.jsonl").stat().st_size if (tmp_path / "metrics.jsonl").exists() else 0
        process = subprocess.Popen([sys.executable, "-c", _LOGGER, str(tmp_path)])
        wait_for(lambda: _size(tmp_path) > size, 60, "the first line")  # noqa: B023
        time.sleep(rng.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        lines = read_metrics(tmp_path)
        started = max(i for i, line in enumerate(lines) if line["step"] == 1)
        session = lines[started:]
        assert [line["step"] for line in session] == list(range(1, len(session) + 1))
        assert all(line["loss"] == 1 / line["step"] and len(line["text"]) == line["step"] % 3000 for line in session)


def _size(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.stat().st_size if file.exists() else 0
