"""What can go wrong around a preparation: another one, a full disk, a worker that dies."""

from __future__ import annotations

import io
import os
import signal
import subprocess
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.prepare import prepare
from data_prep.progress import LineProgress
from data_prep.state import SplitState
from data_prep.verify import verify
from tests.conftest import missing
from tests.data_prep.helpers import TEXT, digests, make_folder, options


def test_two_at_once(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", options())
    before = digests(tmp_path / "out")
    with SplitState(tmp_path / "out" / "train").locked() as exclusive:
        assert exclusive
        for changes in ({}, {"overwrite": True, "resize": 10}, {"repair": True}):
            with pytest.raises(UserError, match="another `rookery prep` is writing here"):
                prepare(source, tmp_path / "out", options(**changes))
    assert digests(tmp_path / "out") == before
    prepare(source, tmp_path / "out", options())


def test_out_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(TEXT)
    with pytest.raises(UserError, match="cannot write"):
        prepare(source, tmp_path / "out", options())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(tmp_path: Path, workers: int) -> None:
    source = make_folder(tmp_path / "source", per_class=40, size=300)
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", disk]).returncode:
        missing("a full disk left out: only root can mount a small file system")
    try:
        with pytest.raises(UserError, match="no space left on this file system; free some and run the same command"):
            prepare(source, disk / "out", options(shard_samples=10, workers=workers))
        assert not (disk / "out" / "train" / "manifest.json").exists()
        assert not list((disk / "out" / "train" / ".prep" / "tmp").iterdir())
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        prepare(source, disk / "out", options(shard_samples=10, workers=workers))
        prepare(source, tmp_path / "out", options(shard_samples=10))
        assert digests(disk / "out") == digests(tmp_path / "out")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    """As when the kernel kills one for lack of memory. There is work for longer than it takes to find a worker."""
    import multiprocessing

    source = make_folder(tmp_path / "source", per_class=300)

    killed = []

    class Killer(LineProgress):
        def say(self, text: str) -> None:
            if "shards" in text:
                os.kill(os.getpid(), signal.SIGALRM)

    def kill_one(*_: object) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None and not killed:
                killed.append(child.pid)
                os.kill(child.pid, signal.SIGKILL)
        if not killed:
            signal.setitimer(signal.ITIMER_REAL, 0.01)

    previous = signal.signal(signal.SIGALRM, kill_one)
    try:
        with pytest.raises(UserError, match=r"a worker process ended with status -9 while it made train-"):
            prepare(source, tmp_path / "out", options(workers=2), progress=Killer(io.StringIO()))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert not multiprocessing.active_children()
    prepare(source, tmp_path / "out", options())
    assert verify(tmp_path / "out") == []
