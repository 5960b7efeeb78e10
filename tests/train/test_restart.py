"""One of several processes dies: all start again from the newest checkpoint, as often as that helps."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pipeline.train.again import FOLDER, may_start, newest_step
from pipeline.train.export import WEIGHTS
from pipeline.train.trace import read_trace
from tests.train.commands import command, environment
from tests.train.conftest import Rookery
from tests.train.forked import ForkServer


def workers(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes, in the order of their ranks."""
    children = psutil.Process(launcher.pid).children()
    return sorted((child for child in children if "pipeline.train.again" in " ".join(child.cmdline())), key=rank)


def rank(process: psutil.Process) -> int:
    return int(process.environ()["RANK"])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_is_replaced(victim: int, recipe: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    fork_server.train(recipe, "name=whole", nproc=2)
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    arguments = ("train", recipe, "name=cut", "--nproc", 2, "--threads", 1)
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(command(*arguments), stdout=log, stderr=log, env=environment(), text=True)
        wait_until(lambda: newest_step(cut) >= 5, launcher)
        os.kill(workers(launcher)[victim].pid, signal.SIGKILL)
        assert launcher.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    assert "a process died; all start again after step" in (tmp_path / "log").read_text()
    assert (cut / "final" / WEIGHTS).read_bytes() == (whole / "final" / WEIGHTS).read_bytes()
    assert read_trace(cut) == read_trace(whole)


def wait_until(reached, launcher: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_a_mistake_is_told_once(recipe: Path, rookery: Rookery) -> None:
    """A status that the processes chose is not one of a death: they are not started again."""
    began = time.monotonic()
    diverged = rookery("train", recipe, "optim.lr=1e30", "train.max_bad_steps=1", "--nproc", 2, check=2)
    assert diverged.stderr.count("steps in a row") == 1
    assert "start again after step" not in diverged.stderr
    assert time.monotonic() - began < 120


@pytest.mark.parametrize(
    ("steps", "allowed"),
    [([0], True), ([0, 0], True), ([0, 0, 0], False), ([0, 5, 5, 9], True), ([5, 5, 5], False), ([5, 5, 8, 8], True)],
)
def test_no_progress_twice_is_the_end(
    steps: list[int], allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert [may_start(step) for step in steps][-1] is allowed


def test_alone_nobody_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    assert all(may_start(0) for _ in range(5))
