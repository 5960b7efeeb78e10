"""One of several processes dies: all start again from the newest checkpoint, as often as that helps."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from launch.workers import Nodes
from pipeline.config_load import load_config
from pipeline.errors import UserError
from pipeline.resolve import resolve
from pipeline.train.again import FOLDER, is_stuck, newest_step, note_start
from pipeline.train.distributed import World
from pipeline.train.export import WEIGHTS
from pipeline.train.setup import check_same_command
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

    def started(self, rank: int) -> bool:
        """Whether there is a process of a rank."""
        try:
            self.worker(rank)
        except (StopIteration, psutil.Error):
            return False
        return True

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


def test_a_signal_ends_all_nodes(recipe: Path, tmp_path: Path) -> None:
    """The node where all meet ends first or last; both say the same."""
    run = Launchers(tmp_path, recipe, 2, 1, "train.epochs=100000steps")
    run.wait_for_step(tmp_path / "runs" / "cut", 5)
    run.launchers[0].send_signal(signal.SIGUSR1)
    assert [launcher.wait(timeout=120) for launcher in run.launchers] == [75, 75], run.log.read_text()
    said = run.log.read_text()
    assert "frame #" not in said and "Traceback" not in said and "died" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_processes_start(number: int, recipe: Path, tmp_path: Path) -> None:
    run = Launchers(tmp_path, recipe, 1, 2)
    deadline = time.monotonic() + 120
    while not run.started(1):  # another child may be git, which is asked for the commit
        assert run.launchers[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    run.launchers[0].send_signal(number)
    assert run.launchers[0].wait(timeout=60) == 130, run.log.read_text()
    assert "died" not in run.log.read_text() and not (tmp_path / "runs").exists()


def test_nodes_with_different_commands(recipe: Path) -> None:
    class Told:
        """A world in which another rank has another run."""

        def __init__(self, *others: dict[str, object]) -> None:
            self.others = others

        def gather(self, own):  # type: ignore[no-untyped-def]
            if isinstance(own, str):
                return [own, *(f"digest {i}" for i in range(len(self.others)))]
            return [own, *({**own, **changes} for changes in self.others)]

        def fail(self, message: str) -> None:
            raise UserError(message)

    run = resolve(load_config(recipe), 2)
    with pytest.raises(
        UserError, match=r"rank 0 and rank 1 .* \(optim.lr: 0.001 there, 0.5 here\); give all nodes the"
    ):
        check_same_command(run, Told({"optim.lr": 0.5}))  # type: ignore[arg-type]
    check_same_command(run, World(0, 1, 0, torch.device("cpu")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nodes", "2"], "needs --rendezvous HOST:PORT"),
        (["--nodes", "2", "--rendezvous", "host"], "--rendezvous host: write HOST:PORT"),
        (["--nodes", "2", "--rendezvous", "127.0.0.1:abc"], "--rendezvous 127.0.0.1:abc: write HOST:PORT"),
        (["--nodes", "2", "--rendezvous", "127.0.0.1:99999"], "write HOST:PORT"),
        (["--nodes", "2", "--rendezvous", "no-such-host.invalid:29500"], "no-such-host.invalid is not known here"),
        (["--rendezvous", "127.0.0.1:29500"], "--rendezvous goes with --nodes N"),
    ],
)
def test_no_place_to_meet(options: list[str], said: str) -> None:
    values = dict(zip(options[::2], options[1::2], strict=True))
    with pytest.raises(UserError) as error:
        Nodes(1, int(values.get("--nodes", 1)), values.get("--rendezvous")).check()
    assert said in str(error.value)


def listens(launcher: subprocess.Popen[bytes]) -> bool:
    connections = psutil.Process(launcher.pid).net_connections("tcp")
    return any(connection.status == psutil.CONN_LISTEN for connection in connections)


def test_a_mistake_is_told_once(recipe: Path, rookery: Rookery) -> None:
    """A status that the processes chose is not one of a death: they are not started again."""
    began = time.monotonic()
    # With MLflow rank 0, which tells of it, takes longer to leave than the others.
    options = ("optim.lr=1e30", "train.max_bad_steps=1", "tracking.mlflow=true")
    diverged = rookery("train", recipe, *options, "--nproc", 2, check=2)
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
