"""A disk that fills up while a run saves costs checkpoints, not the run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.tracking.metrics import read_metrics
from pipeline.train.again import newest_step
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.export import WEIGHTS
from tests.conftest import small_disk
from tests.train.commands import command, environment
from tests.train.forked import ForkServer

STEPS = 120


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "8m") as disk:
        yield disk


def test_training_goes_on(disk: Path, recipe: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    arguments = (recipe, f"train.epochs={STEPS}steps", "data.trace=false", "eval.every=40steps", "name=run")
    fork_server.train(*arguments)
    run, filler, log = disk / "run", disk / "filler", tmp_path / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command("train", *arguments, f"out={disk}", "--threads", 1), stdout=out, stderr=out, env=environment()
        )
        wait_for(lambda: newest_step(run) >= 10, process, log)
        with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while file.write(bytes(1 << 16)) == 1 << 16:
                pass
            file.write(bytes(1 << 16))
        last = newest_step(run)
        wait_for(lambda: log.read_text().count("is not saved: ") >= 2, process, log)
        assert CheckpointStore(run / "checkpoints").newest() is not None and newest_step(run) <= last + 5
        filler.unlink()
        full = newest_step(run)
        wait_for(lambda: newest_step(run) > full, process, log)
        assert process.wait(timeout=120) == 0, log.read_text()
    said = log.read_text()
    assert "training goes on" in said and "metrics.jsonl can't be written" in said and "Traceback" not in said
    assert (run / "final" / WEIGHTS).read_bytes() == (tmp_path / "runs" / "run" / "final" / WEIGHTS).read_bytes()
    steps = [line["step"] for line in read_metrics(run) if line["kind"] == "train"]
    assert steps == [*range(1, STEPS + 1)]


def wait_for(reached, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def test_a_log_that_can_not_be_written_costs_the_log(recipe: Path, tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(
            command("train", recipe, "train.stop_after=2steps", f"out={tmp_path}", "name=run", "--threads", 1),
            stdout=full,
            stderr=full,
            env=environment(),
        )
        assert process.wait(timeout=120) == 0
    assert (tmp_path / "run" / "final" / WEIGHTS).exists()
