"""Stopped by Ctrl-C, a scheduler or a kill of its agent, a run ends cleanly and goes on with the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pipeline.tracking.metrics import read_metrics
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.status import INTERRUPTED, RESUBMIT
from tests.train.commands import command, environment
from tests.train.conftest import Rookery


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Trainings of a test; what is left of them when it ends is killed."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def start(
    started: list[subprocess.Popen[str]], recipe: Path, folder: Path, nproc: int, *overrides: str
) -> subprocess.Popen[str]:
    """A training in a session of its own, that has made a checkpoint."""
    process = subprocess.Popen(
        command("train", recipe, "--nproc", nproc, "--threads", 1, "train.epochs=2000steps", *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=folder,
        start_new_session=True,
        # Where these tests run in the background of a script, SIGINT is ignored, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    started.append(process)
    deadline = time.monotonic() + 120
    while not list((folder / "runs" / "run").glob("checkpoints/step-*/commit.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    return process


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("number", "whom", "nproc"),
    [
        (signal.SIGINT, "group", 1),
        (signal.SIGTERM, "leader", 1),
        (signal.SIGINT, "group", 2),
        (signal.SIGTERM, "group", 2),
        (signal.SIGTERM, "leader", 2),
        (signal.SIGUSR1, "leader", 1),
        (signal.SIGTERM, "everybody", 1),
        (signal.SIGUSR1, "everybody", 2),
    ],
)
def test_a_signal_ends_it_cleanly(
    number: int, whom: str, nproc: int, recipe: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    # Every step waits for the loader processes.
    loaders = ("data.workers=1", "data.prefetch=1") if whom == "everybody" else ()
    process = start(started, recipe, tmp_path, nproc, *loaders)
    workers = psutil.Process(process.pid).children(recursive=True)
    if whom == "group":  # as a terminal does
        os.killpg(process.pid, number)
    else:  # as `kill` does
        process.send_signal(number)
    if whom == "everybody":  # as Slurm does
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (RESUBMIT if number == signal.SIGUSR1 else INTERRUPTED)
    assert errors.splitlines() == ["interrupted; the same command continues from the newest checkpoint"]
    assert not psutil.wait_procs(workers, timeout=10)[1]
    last = json.loads((tmp_path / "runs" / "run" / "sessions.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["status"]) == ("end", "interrupted")
    trained = [line["step"] for line in read_metrics(tmp_path / "runs" / "run") if line["kind"] == "train"]
    newest = CheckpointStore(tmp_path / "runs" / "run" / "checkpoints").newest()
    assert newest is not None and newest.step == trained[-1]


@pytest.mark.chaos
def test_workers_end_with_their_agent_and_another_start_goes_on(
    recipe: Path, rookery: Rookery, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    process = start(started, recipe, tmp_path, 2)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.communicate(timeout=60)
    assert not psutil.wait_procs(workers, timeout=30)[1]
    done = rookery("train", recipe, "--nproc", 2, "--threads", 1, "train.epochs=2000steps", "train.stop_after=1steps")
    assert "/runs/run after step " in " ".join(done.stdout.split())  # a narrow table breaks lines


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, INTERRUPTED), (signal.SIGUSR1, RESUBMIT)],
)
def test_signals_before_there_is_a_run(
    number: signal.Signals, status: int, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    """While it reads a recipe that never comes."""
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)
    process = subprocess.Popen(
        command("train", recipe),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started.append(process)
    deadline = time.monotonic() + 100
    while True:  # until it is read
        assert process.poll() is None and time.monotonic() < deadline
        with suppress(OSError):
            writer = os.open(recipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    os.close(writer)
    assert process.stderr is not None and process.stderr.read() == ""
