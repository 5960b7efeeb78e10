"""The node's cache: verified bytes only, one download for all processes, never above its limit, whatever is killed."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_prep.attempts import Patience
from data_prep.remote import RemoteStore
from pipeline.data import cache as cache_module
from pipeline.data.cache import DamagedFile, NodeCache, RemoteFile
from pipeline.data.cache_room import CacheOptions, room_for
from pipeline.errors import UserError
from tests.conftest import small_disk
from tests.faulty_server import FaultyServer, Request, folder
from tests.folder_watch import LOOKING, Watch

SIZE = 10_000
PATIENT = Patience(tries=3, seconds=20, first_pause=0.01)


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    """Serves files 0 ... 9 of 10 kB."""
    (tmp_path / "files").mkdir()
    for number in range(10):
        (tmp_path / "files" / str(number)).write_bytes(content(number))
    with FaultyServer(folder(tmp_path / "files")) as server:
        yield server


def remote(server: FaultyServer | str, number: int, known: bool = True) -> RemoteFile:
    store = RemoteStore(server if isinstance(server, str) else server.uri, PATIENT)
    return RemoteFile(store, str(number), hashlib.sha256(content(number)).hexdigest(), SIZE if known else None)


def test_no_room_and_no_patience_is_no_descriptor(server: FaultyServer, tmp_path: Path) -> None:
    """Closing a number that was closed already would close what another thread has opened meanwhile."""
    cache = make(tmp_path / "cache", 1.5)
    with open(tmp_path / "cache" / f"{remote(server, 0).sha256}.part", "wb") as part:  # somebody else's, on its way
        fcntl.flock(part, fcntl.LOCK_EX)
        part.truncate(SIZE)
        part.flush()
        before = set(os.listdir("/proc/self/fd"))
        assert cache.open(remote(server, 1), wait=False) is None
        assert set(os.listdir("/proc/self/fd")) <= before
    assert read(cache, remote(server, 1)) == content(1)


def _ask(address: str, folder: Path, told: Any) -> None:
    try:
        make(folder).open(remote(address, 3))
    except DamagedFile as error:
        told.put((str(error), pickle.loads(pickle.dumps(error)).reason))


def test_processes_of_a_node_fetch_a_damaged_file_once(server: FaultyServer, tmp_path: Path) -> None:
    """Three times, that is; whoever asks next is told what was found."""
    (tmp_path / "files" / "3").write_bytes(content(4))
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    processes = [context.Process(target=_ask, args=(server.uri, tmp_path / "cache", told)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = {told.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    (message, reason) = answers.pop()
    assert not answers and "not what the manifest describes" in reason and reason in message
    assert server.asked("/3") == 3
    assert not list((tmp_path / "cache").glob("*.part"))


def make(folder: Path, files: float | None = None) -> NodeCache:
    """A cache with room for so many files."""
    return NodeCache(CacheOptions(str(folder), None if files is None else files * SIZE / 1e9))


def read(cache: NodeCache, file: RemoteFile) -> bytes:
    descriptor = cache.open(file)
    assert descriptor is not None
    with os.fdopen(descriptor, "rb") as opened:
        opened.seek(0)
        return opened.read()


def held(folder: Path) -> set[int]:
    names = {path.name for path in folder.iterdir()}
    return {number for number in range(10) if hashlib.sha256(content(number)).hexdigest() in names}


def parts(folder: Path) -> list[Path]:
    return list(folder.glob("*.part"))


@pytest.mark.parametrize("known", [True, False])
def test_a_file_is_fetched_once_and_kept(server: FaultyServer, tmp_path: Path, known: bool) -> None:
    file = remote(server, 3, known)
    for _ in range(2):
        cache = make(tmp_path / "cache", 5)
        assert not cache.holds(remote(server, 4)) and read(cache, file) == read(cache, file) == content(3)
        assert cache.holds(file)
    assert server.asked("3") == 1 and held(tmp_path / "cache") == {3} and not parts(tmp_path / "cache")
    (tmp_path / "cache" / file.sha256).write_bytes(content(3)[:-1])
    assert read(make(tmp_path / "cache"), file) == (content(3) if known else content(3)[:-1])


def test_what_was_used_the_longest_ago_goes(server: FaultyServer, tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", 3.5)
    for number in (0, 1, 2, 0, 3):
        read(cache, remote(server, number))
        for place in (tmp_path / "cache").iterdir():  # a second goes by
            os.utime(place, ns=(0, place.stat().st_mtime_ns - 10**9))
        cache._touched.clear()
    assert held(tmp_path / "cache") == {0, 2, 3}
    opened = cache.open(remote(server, 2))
    make(tmp_path / "cache", 1)  # a later run with a smaller limit
    assert held(tmp_path / "cache") == {2}
    read(make(tmp_path / "cache", 1), remote(server, 5))
    assert held(tmp_path / "cache") == {5}
    assert opened is not None and os.pread(opened, SIZE, 0) == content(2), "an open file outlives its name"
    os.close(opened)


def test_damage_on_the_way_and_damage_in_the_store(
    server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = {"/1": 2, "/2": 100}

    def fault(request: Request) -> Any:
        damaged[request.path] = damaged.get(request.path, 0) - 1
        return "corrupt" if damaged[request.path] >= 0 else None

    server.fault = fault
    cache = make(tmp_path / "cache", 5)
    with caplog.at_level(logging.WARNING, "rookery"):
        assert read(cache, remote(server, 1)) == content(1)
    assert [record.getMessage() for record in caplog.records] == 2 * [
        f"{server.uri}/1: arrived damaged (its sha256 is not that of the manifest), fetching it again"
    ]
    with pytest.raises(DamagedFile, match=r"/2: not what the manifest describes, 3 times in a row"):
        read(cache, remote(server, 2))
    with pytest.raises(FileNotFoundError):
        read(cache, RemoteFile(remote(server, 1).store, "none", "0" * 64, SIZE))
    assert held(tmp_path / "cache") == {1} and not parts(tmp_path / "cache")


def test_a_limit_below_one_file_is_refused(server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a file of 1e-05 GB has no place in the 9e-06 GB .* raise data.cache_gb"):
        read(make(tmp_path / "cache", 0.9), remote(server, 0))
    assert not parts(tmp_path / "cache") and server.asked("0") == 0


def test_a_cache_that_can_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/cache: can't be used as cache \(Not a directory\); set data.cache"):
        make(tmp_path / "file" / "cache")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    (tmp_path / "rookery-cache-1234").mkdir()
    with pytest.raises(UserError, match="rookery-cache-1234: belongs to another user"):
        NodeCache(CacheOptions())


def test_where_it_is_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SLURM_TMPDIR", "TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert CacheOptions().path == Path("~/.cache/rookery").expanduser()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    assert CacheOptions().path == tmp_path / "tmp" / f"rookery-cache-{os.getuid()}"
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "job"))
    assert CacheOptions().path == tmp_path / "job" / f"rookery-cache-{os.getuid()}"
    assert CacheOptions("/x", 2.5).path == Path("/x") and room_for(CacheOptions("/x", 2.5)) == 2_500_000_000


def test_a_full_disk(server: FaultyServer, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        room = room_for(CacheOptions(str(disk / "cache")))
        assert room == pytest.approx(0.9 * 65536, abs=4096) and not (disk / "cache").exists()
        free = make(disk / "cache")
        for number in range(8):  # a tenth of the disk is left free
            assert read(free, remote(server, number)) == content(number)
        assert held(disk / "cache") == {4, 5, 6, 7} and 4 * SIZE < free.limit() < room
        with pytest.raises(UserError, match=r"no space left on this disk; the cache holds .* lower data.cache_gb"):
            for number in range(10):
                read(make(disk / "cache", 20), remote(server, number))
        assert not parts(disk / "cache")
        # The next start, with a limit that fits, goes on.
        assert read(make(disk / "cache", 4), remote(server, 9)) == content(9)


def test_a_file_system_without_locks(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(cache_module.fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"a file system without locks.*set data.cache to a folder on a disk"):
        make(tmp_path / "cache")


def test_a_long_wait_is_told(
    server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_TOLD_SECONDS", 0.0)
    cache = make(tmp_path / "cache", 5)
    with caplog.at_level(logging.WARNING, "rookery"):
        read(cache, remote(server, 1))
        read(make(tmp_path / "cache", 5), remote(server, 2))  # so soon after the first nothing more is said
    [record] = caplog.records
    assert record.getMessage().endswith("MB/s)") and f" s for {server.uri}/1 (0.0 MB, " in record.getMessage()


def test_memory_of_this_process(tmp_path: Path) -> None:
    RemoteStore("memory://set").write("7", content(7))
    try:
        assert read(make(tmp_path / "cache", 2), remote("memory://set", 7)) == content(7)
    finally:
        MemoryFileSystem.store.clear()


def test_no_file_changes_its_name_while_room_is_made(server: FaultyServer, tmp_path: Path) -> None:
    """Between the listing of the folder and the look at a file that file would be missed, and its room taken twice."""
    cache, file = make(tmp_path / "cache", 3), remote(server, 1)
    fetched, go_on = threading.Event(), threading.Event()
    fetch = file.store.fetch

    def slow(*args: Any) -> None:
        fetch(*args)
        fetched.set()
        assert go_on.wait(60)

    file.store.fetch = slow  # type: ignore[method-assign]
    reader = threading.Thread(target=read, args=(cache, file))
    reader.start()
    assert fetched.wait(60)
    with cache._locked():
        go_on.set()
        reader.join(0.5)
        assert len(parts(tmp_path / "cache")) == 1 and not held(tmp_path / "cache")
    reader.join(60)
    assert held(tmp_path / "cache") == {1} and not parts(tmp_path / "cache")


# Several processes.

FORK = multiprocessing.get_context("fork")


def start(target: Callable[..., None], *args: Any) -> Any:
    """A process that does not share this one's connections."""
    process = FORK.Process(target=target, args=args, daemon=True)
    with LOOKING:
        process.start()
    return process


def reader(folder: Path, uri: str, files: list[int], room: float, results: Any) -> None:
    try:
        cache = make(folder, room)
        wrong = [number for number in files if read(cache, remote(uri, number)) != content(number)]
        results.put(f"wrong: {wrong}" if wrong else "fine")
    except BaseException as error:
        results.put(repr(error))


def test_one_download_for_all_processes(server: FaultyServer, tmp_path: Path) -> None:
    answer = server.answer

    def slow(request: Request) -> Any:
        time.sleep(0.3)
        return answer(request)

    server.answer = slow
    results = FORK.SimpleQueue()
    readers = [start(reader, tmp_path / "cache", server.uri, [1, 2], 5, results) for _ in range(4)]
    assert [results.get() for _ in readers] == 4 * ["fine"]
    assert [server.asked(name) for name in ("1", "2")] == [1, 1]


@pytest.mark.parametrize("room", [1.0, 1.5, 2.0, 4.5])
def test_processes_share_a_cache_that_is_too_small(server: FaultyServer, tmp_path: Path, room: float) -> None:
    """Everybody gets all files, although one process's room is another one's file, and the limit holds throughout."""
    draw, results = random.Random(0), FORK.SimpleQueue()
    with Watch(tmp_path / "cache") as watch:
        readers = [
            start(reader, tmp_path / "cache", server.uri, draw.choices(range(10), k=20), room, results)
            for _ in range(3)
        ]
        assert [results.get() for _ in readers] == 3 * ["fine"]
    assert 0 < watch.most <= room * SIZE and watch.looks > 50
    assert len(held(tmp_path / "cache")) <= room and not parts(tmp_path / "cache")


@pytest.mark.chaos
def test_killed_while_fetching(server: FaultyServer, tmp_path: Path) -> None:
    """kill -9 at random moments: nothing half is trusted, nothing is locked for ever, the limit holds."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    draw, folder = random.Random(seed), tmp_path / "cache"
    answer = server.answer

    def slow(request: Request) -> Any:
        time.sleep(draw.uniform(0, 0.02))
        return answer(request)

    server.answer = slow
    saw_parts = 0
    with Watch(folder) as watch:
        for _ in range(15):
            process = start(reader, folder, server.uri, draw.sample(range(10), k=10), 3.5, FORK.SimpleQueue())
            time.sleep(draw.uniform(0.02, 0.3))
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            saw_parts += len(parts(folder)) if folder.is_dir() else 0
            for number in held(folder) if folder.is_dir() else ():
                found = folder / hashlib.sha256(content(number)).hexdigest()
                assert found.read_bytes() == content(number), f"seed {seed}"
        results = FORK.SimpleQueue()
        start(reader, folder, server.uri, list(range(10)), 3.5, results)
        assert results.get() == "fine", f"seed {seed}"
    assert saw_parts, f"seed {seed}"
    assert watch.most <= 3.5 * SIZE, f"seed {seed}"
