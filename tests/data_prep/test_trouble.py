"""What can go wrong around a preparation: another one, a full disk, a worker that dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.prepare import prepare
from data_prep.progress import Advance, SilentProgress
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
    """As when the kernel kills one for lack of memory. All die with their first report, while other shards wait."""
    source = make_folder(tmp_path / "source", per_class=40)
    before = set(multiprocessing.active_children())
    killed: list[int] = []

    class Killer(SilentProgress):
        @contextmanager
        def task(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
            yield self.kill_all

        def kill_all(self, images: int) -> None:
            for child in set(multiprocessing.active_children()) - before:
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
                killed.append(child.pid)

    with pytest.raises(UserError, match=r"a worker process ended with status -9 while it made train-"):
        prepare(source, tmp_path / "out", options(workers=2), progress=Killer())
    assert killed
    assert set(multiprocessing.active_children()) <= before
    prepare(source, tmp_path / "out", options())
    assert verify(tmp_path / "out") == []
