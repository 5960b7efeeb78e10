"""Killed at any moment and started again: the same bytes, and no finished shard made twice."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.options import PrepOptions
from data_prep.prepare import prepare
from data_prep.verify import verify
from tests.data_prep.helpers import TEXT, digests, exits_after, kill, make_folder, wait_for

OPTIONS = PrepOptions(workers=1, shard_samples=4)
CLASSES = ("ant", "bee")
COUNTED = ("replace", "fsync", "unlink", "open", "mkdir", "close")


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: these tests make thousands of fsyncs."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def die_at(step: int, source: Path, out: Path, options: PrepOptions) -> bool:
    """Prepare in a forked process that vanishes at the `step`-th file-system call; False if it finished before."""
    child = os.fork()
    if child == 0:
        try:
            exits_after(step, COUNTED)
            prepare(source, out, options)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def test_death_at_every_file_system_call(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", CLASSES, per_class=3)
    (source / "ant" / "bad.jpg").write_bytes(TEXT)
    prepare(source, tmp_path / "whole", OPTIONS)
    expected = digests(tmp_path / "whole")
    step = 1
    while die_at(step, source, out := tmp_path / f"out{step}", OPTIONS):
        prepare(source, out, OPTIONS)
        assert digests(out) == expected, f"killed at call {step}"
        assert verify(out) == []
        step += 1
    assert step > 20  # each of the two shards alone makes ten such calls


def test_death_after_death(tmp_path: Path) -> None:
    """Each start gets a little further than the one before and is killed too."""
    source = make_folder(tmp_path / "source", CLASSES, per_class=3)
    prepare(source, tmp_path / "whole", OPTIONS)
    deaths = 0
    while die_at(18, source, tmp_path / "out", OPTIONS):
        deaths += 1
        assert deaths < 50
    assert deaths > 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_death_while_overwriting(tmp_path: Path) -> None:
    """The old shards never mix with the new ones, and `--overwrite` again continues rather than starts over."""
    source = make_folder(tmp_path / "source", CLASSES, per_class=3)
    new = PrepOptions(workers=1, shard_samples=2, resize=20, overwrite=True)
    prepare(source, tmp_path / "whole", new)
    expected = digests(tmp_path / "whole")
    step, out = 1, tmp_path / "out"
    while True:
        prepare(source, out, PrepOptions(workers=1, shard_samples=4, overwrite=True))
        if not die_at(step, source, out, new):
            break
        prepare(source, out, new)
        assert digests(out) == expected, f"killed at call {step}"
        step += 3
    assert step > 20


def test_finished_shards_are_not_made_again(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", per_class=6)
    step = 40
    assert die_at(step, source, tmp_path / "out", OPTIONS)
    out = tmp_path / "out" / "train"
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    finished = {name: made for name, made in finished.items() if (out / ".prep" / f"{name}.json").exists()}
    assert 0 < len(finished) < 5
    prepare(source, tmp_path / "out", OPTIONS)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished


@pytest.mark.chaos
def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    """kill -9 of the parent alone (its workers must follow) and of the whole group, in turn."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    source = make_folder(tmp_path / "source", per_class=40, size=400)
    options = PrepOptions(workers=2, shard_samples=6, resize=200)
    prepare(source, tmp_path / "whole", options)
    expected = digests(tmp_path / "whole")
    kills, rounds = 0, 0
    while kills < 20:
        out = tmp_path / f"out{rounds}"
        process = start(source, out)
        wait_for(out / "train" / ".prep" / "plan.json", process)
        time.sleep(draw.uniform(0, 0.9))
        kills += kill(process, whole_group=kills % 2 == 0)
        if (out / "train" / "manifest.json").exists():
            assert digests(out) == expected, f"seed {seed}, {kills} kills"
            rounds += 1
    prepare(source, out, options)
    assert digests(out) == expected, f"seed {seed}"


def start(source: Path, out: Path) -> subprocess.Popen[bytes]:
    code = (
        "from data_prep.options import PrepOptions; from data_prep.prepare import prepare; "
        f"prepare({str(source)!r}, {str(out)!r}, PrepOptions(workers=2, shard_samples=6, resize=200))"
    )
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
