"""One of several processes dies: all start again from the newest checkpoint, as often as that helps."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pipeline.train.again import FOLDER, is_stuck, newest_step, note_start
from pipeline.train.export import WEIGHTS
from pipeline.train.trace import read_trace
from tests.cluster.slurm_cluster import free_ports
from tests.train.commands import command, environment
from tests.train.conftest import Rookery
from tests.train.forked import ForkServer


class Launchers:
    """Launchers of one run, each as on a node of its own."""

    def __init__(self, folder: Path, recipe: Path, nodes: int, nproc: int, *overrides: str) -> None:
        self.log = folder / "log"
        meeting = ["--nodes", nodes, "--rendezvous", f"127.0.0.1:{free_ports(1)[0]}"] if nodes > 1 else []
        self._command = command("train", recipe, "name=cut", *overrides, "--nproc", nproc, "--threads", 1, *meeting)
        self.launchers = [self.launch() for _ in range(nodes)]

    def launch(self) -> subprocess.Popen[bytes]:
        with open(self.log, "ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, env=environment())

    def worker(self, rank: int) -> psutil.Process:
        """The training process of a rank."""
        children = [child for launcher in self.launchers for child in psutil.Process(launcher.pid).children()]
        return next(child for child in children if child.environ().get("RANK") == str(rank))

    def wait_for_step(self, run: Path, step: int) -> None:
        deadline = time.monotonic() + 120
        while newest_step(run) < step:
            assert all(launcher.poll() is None for launcher in self.launchers), self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def check_end(self, cut: Path, whole: Path) -> None:
        """All end well, and the run is as if nothing had happened."""
        for launcher in self.launchers:
            assert launcher.wait(timeout=300) == 0, self.log.read_text()
        assert "a process died; all start again after step" in self.log.read_text()
        assert (cut / "final" / WEIGHTS).read_bytes() == (whole / "final" / WEIGHTS).read_bytes()
        assert read_trace(cut) == read_trace(whole)


@pytest.fixture
def whole(recipe: Path, fork_server: ForkServer, tmp_path: Path) -> Path:
    """The run without an accident."""
    fork_server.train(recipe, "name=whole", nproc=2)
    return tmp_path / "runs" / "whole"


def test_a_dead_process_is_replaced(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """On another node; for one on the same node see the watchdog's test."""
    run = Launchers(tmp_path, recipe, 2, 1)
    run.wait_for_step(tmp_path / "runs" / "cut", 5)
    run.worker(1).kill()
    run.check_end(tmp_path / "runs" / "cut", whole)


def test_a_dead_node_may_come_back(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """The others wait for it, and its launcher is told nothing but the same command."""
    run = Launchers(tmp_path, recipe, 2, 1)
    run.wait_for_step(tmp_path / "runs" / "cut", 5)
    # Not the one where the nodes meet.
    number = next(i for i, launcher in enumerate(run.launchers) if not listens(launcher))
    run.launchers[number].kill()
    run.launchers[number].wait()
    run.launchers[number] = run.launch()
    run.check_end(tmp_path / "runs" / "cut", whole)


def listens(launcher: subprocess.Popen[bytes]) -> bool:
    connections = psutil.Process(launcher.pid).net_connections("tcp")
    return any(connection.status == psutil.CONN_LISTEN for connection in connections)


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
    assert [is_stuck(note_start(step), step) for step in steps][-1] is not allowed


def test_alone_nobody_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    assert not any(note_start(0) for _ in range(5))
