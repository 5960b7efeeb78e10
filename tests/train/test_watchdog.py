"""A run that hangs says who keeps it waiting and where, and starts again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.workers import Nodes, start_workers
from pipeline.train.distributed import World
from pipeline.train.process import run_process
from pipeline.train.watchdog import Mark, Watchdog, blame
from tests.train.commands import ROOT, environment
from tests.train.forked import ForkServer
from tests.train.test_restart import Launchers


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([(7, "trains"), (7, "trains")], "every process trains in step 7; the stacks tell more"),
        ([(7, "trains"), (7, "waits for data")], "the others wait for rank 1: waits for data in step 7"),
        ([(8, "waits for data"), (7, "saves"), (8, "trains")], "the others wait for rank 1: saves in step 7"),
        ([(7, "logs"), (7, "trains"), (7, "trains")], "the others wait for ranks 1, 2: trains in step 7"),
        ([(7, "trains"), None, (7, "trains")], "rank 1 did not answer"),
        ([None, (7, "trains"), None], "ranks 0, 2 did not answer"),
    ],
)
def test_who_is_to_blame(answers: list[tuple[int, str] | None], said: str) -> None:
    marks = {rank: Mark(*answer, since=0.0) for rank, answer in enumerate(answers) if answer is not None}
    assert blame(marks, len(answers)) == said


def test_the_rank_and_its_stack_are_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", __name__], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "(train.hang_minutes): the others wait for rank 1: waits for data in step 3" in done.stderr
    own = done.stderr.split("rookery: rank 1 waits for data in step 3")[1]
    assert "in stuck_here" in own
    assert "rank 0 trains in step 3" in done.stderr and "in barrier" in done.stderr


def test_a_process_that_is_stopped_is_replaced(recipe: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    """The harder case: the others can't even ask, since the store where all meet is on rank 0."""
    fork_server.train(recipe, "name=whole", nproc=2)
    run = Launchers(tmp_path, recipe, 1, 2, "train.hang_minutes=0.1")
    run.wait_for_step(tmp_path / "runs" / "cut", 10)
    os.kill(run.worker(0).pid, signal.SIGSTOP)
    run.check_end(tmp_path / "runs" / "cut", tmp_path / "runs" / "whole")
    said = run.log.read_text()
    assert "(train.hang_minutes): rank 0, where the processes meet, did not answer" in said
    # Where it waits for rank 0 depends on the moment.
    assert re.search(
        r"rookery: rank 1 (trains|logs|evaluates|saves) in step \d+ for \d+ s; its threads:\n.*\n  File ", said
    ), said


def stuck_here() -> None:
    time.sleep(1000)


def _hang(world: World) -> None:
    with Watchdog(world, 2 / 60) as watch:
        for _ in range(6):  # the first steps may take longer
            watch.begin(3, "waits for data")
        if world.rank == 1:
            stuck_here()
        watch.begin(3, "trains")
        dist.barrier()


def run(payload: str, threads: int | None = None) -> int:
    """What the worker processes of `test_the_rank_and_its_stack_are_named` do."""
    return run_process(_hang, threads)


if __name__ == "__main__":
    os._exit(start_workers("tests.train.test_watchdog", "", Nodes(2)))
