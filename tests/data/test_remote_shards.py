"""Shards behind an address: the samples of a local directory, fetched once, and before they are needed."""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch.utils.data import Dataset

import pipeline.data.ahead as ahead_module
import pipeline.data.batches as batches_module
import pipeline.data.cache_faults as cache_faults
import pipeline.data.loader as loader_module
from data_prep.attempts import SECONDS, TRIES
from data_prep.hashes import file_sha256
from data_prep.store import open_store
from data_prep.verify import verify
from pipeline.data.ahead import ComingShards, fetched_ahead
from pipeline.data.batches import Batches
from pipeline.data.cache_room import CacheOptions
from pipeline.data.files import CachedFiles
from pipeline.data.loader import load_sample
from pipeline.data.order import DataOrder
from pipeline.data.resident.split import _Chunk, _Chunks
from pipeline.data.shards import ShardSet
from pipeline.data.substitute import BadSample, Substitutes
from pipeline.errors import Unreachable, UserError
from tests.data.test_shards import tar_samples
from tests.faulty_server import FaultyServer, folder


@pytest.fixture
def server(digits: Path) -> Iterator[FaultyServer]:
    with FaultyServer(folder(digits)) as server:
        yield server


@pytest.fixture
def memory(digits: Path) -> Iterator[str]:
    """The test split in the memory of this process."""
    store = open_store("memory://bucket/test")
    for path in (digits / "test").glob("[!.]*"):
        store.write(path.name, path.read_bytes())
    yield "memory://bucket/test"
    MemoryFileSystem.store.clear()


def options(tmp_path: Path, gigabytes: float | None = None) -> CacheOptions:
    return CacheOptions(str(tmp_path / "cache"), gigabytes)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("place", ["memory", "web"])
def test_samples_are_those_of_the_directory(
    place: str, cached: bool, memory: str, server: FaultyServer, digits: Path, tmp_path: Path
) -> None:
    expected = tar_samples(digits / "test")
    address = memory if place == "memory" else f"{server.uri}/test"
    shards = ShardSet(address, options(tmp_path) if cached else None)
    assert shards.directory == address and shards.manifest == ShardSet(digits / "test").manifest
    order = random.Random(0).choices(range(len(shards)), k=60)
    assert list(shards.read(order)) == [expected[i] for i in order]
    assert shards.keys(order) == [expected[i].key for i in order]
    copy = pickle.loads(pickle.dumps(shards))
    assert list(copy.read(order[:5])) == [expected[i] for i in order[:5]]
    if place == "web":
        assert [server.asked("000.tar"), server.asked("001.tar")] == ([1, 1] if cached else [27, 38])
    assert (tmp_path / "cache").exists() == cached


def test_no_file_stays_open(server: FaultyServer, tmp_path: Path) -> None:
    """What the cache throws away must not stay on the disk; the indexes, which do, are small."""
    shards = ShardSet(f"{server.uri}/test", options(tmp_path))
    list(shards.read(range(0, len(shards), 10)))
    opened = {Path("/proc/self/fd", link).resolve().name for link in os.listdir("/proc/self/fd")}
    assert opened & {shard.index_sha256 for shard in shards.manifest.shards}
    assert not opened & {shard.sha256 for shard in shards.manifest.shards}


def test_a_cache_of_one_shard_works(digits: Path, server: FaultyServer, tmp_path: Path) -> None:
    expected = tar_samples(digits / "test")
    largest = max(shard.bytes for shard in ShardSet(digits / "test").manifest.shards)
    shards = ShardSet(f"{server.uri}/test", options(tmp_path, 1.2 * largest / 1e9))
    order = [0, 359, 1, 358, 2, 357]
    assert list(shards.read(order)) == [expected[i] for i in order]
    assert server.asked("000.tar") == server.asked("001.tar") == 3


def test_a_lost_or_cut_shard_shows_at_once_where_files_are_listed(memory: str, tmp_path: Path) -> None:
    store = open_store(memory)
    store.write("test-000001.tar", store.read("test-000001.tar")[:-1])
    with pytest.raises(
        UserError, match=r"memory://bucket/test/test-000001.tar: \d+ bytes, the manifest says \d+; rest"
    ):
        ShardSet(memory)
    store.remove("test-000001.tar")
    with pytest.raises(UserError, match=r"memory://bucket/test/test-000001.tar: shard missing \(No such file"):
        ShardSet(memory, options(tmp_path))


@pytest.mark.parametrize("lost", ["test-000000.tar", "test-000000.idx.npy"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_file_that_a_web_server_lost(lost: str, cached: bool, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "test", tmp_path / "files" / "test")
    (tmp_path / "files" / "test" / lost).unlink()
    with FaultyServer(folder(tmp_path / "files")) as server:
        shards = ShardSet(f"{server.uri}/test?sig=geheim", options(tmp_path) if cached else None)
        with pytest.raises(UserError, match=rf"{lost}\?sig=\*\*\*: .*can't be read .*`rookery verify") as caught:
            list(shards.read([0]))
        assert "geheim" not in str(caught.value)
        assert len(list(shards.read([len(shards) - 1]))) == 1


def test_a_store_that_fails_is_one_message(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRIES, "2")
    monkeypatch.setenv(SECONDS, "0.5")
    shards = ShardSet(f"{server.uri}/test", options(tmp_path))
    server.fault = lambda request: "stall"
    with pytest.raises(UserError, match=r"idx.npy: no success in 2 tries, the last: .*set ROOKERY_STORE_TRIES"):
        list(shards.read([0]))


def spoil(path: Path, damage: str) -> None:
    if damage == "gone":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("lost", ["test-000000.tar", "test-000000.idx.npy"])
@pytest.mark.parametrize("cached", [True, False])
def test_what_is_damaged_in_the_store_is_a_bad_sample(
    damage: str, lost: str, cached: bool, digits: Path, tmp_path: Path
) -> None:
    """Which a run replaces; and no reason to fetch a shard again for each of its samples."""
    shutil.copytree(digits / "test", tmp_path / "files" / "test")
    spoil(tmp_path / "files" / "test" / lost, damage)
    with FaultyServer(folder(tmp_path / "files")) as server:
        shards = ShardSet(f"{server.uri}/test", options(tmp_path) if cached else None)
        last = shards.manifest.shards[0].samples - 1
        if lost.endswith("tar") and damage == "flipped" and not cached:
            assert len(list(shards.read([0, last]))) == 2  # what is asked for alone, nobody hashes
            return
        for _ in range(4):
            with pytest.raises(BadSample) as caught:
                load_sample(shards, last, 1)
        reason = "can't be read" if damage == "gone" else "not .* that the manifest|not what the manifest|bytes are the"
        assert re.search(reason, caught.value.reason) and caught.value.file == lost
        assert caught.value.lost or not cached or damage == "gone"
        if cached and damage == "flipped":
            assert server.asked(lost) == 3
        if cached and damage == "gone":
            assert server.asked(lost) == 1
        replaced = Substitutes([s.samples for s in shards.manifest.shards], 0, True)
        by, _, fault = replaced.load(last, 0, lambda sample: load_sample(shards, sample, 1))
        assert by > last and fault is not None


def test_a_shard_damaged_in_the_store_and_mended_counts_again(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(digits / "test", tmp_path / "files" / "test")
    path = tmp_path / "files" / "test" / "test-000000.tar"
    spoil(path, "flipped")
    with FaultyServer(folder(tmp_path / "files")) as server:
        shards = ShardSet(f"{server.uri}/test", options(tmp_path))
        with pytest.raises(BadSample):
            load_sample(shards, 0, 1)
        spoil(path, "flipped")
        with pytest.raises(BadSample):
            load_sample(shards, 0, 1)
        monkeypatch.setattr(cache_faults, "_SECONDS", 0.0)
        assert load_sample(shards, 0, 1).key == shards.keys([0])[0]


@pytest.mark.parametrize("what", ["shard", "index"])
def test_a_copy_that_rots_in_the_cache_is_fetched_again(
    what: str, server: FaultyServer, digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = np.asarray(load_sample(ShardSet(digits / "test"), 3, 1).picture)
    described = ShardSet(digits / "test").manifest.shards[0]
    list(ShardSet(f"{server.uri}/test", options(tmp_path)).read([3]))
    copy = tmp_path / "cache" / (described.sha256 if what == "shard" else described.index_sha256)
    copy.write_bytes(bytes(copy.stat().st_size))  # as long as before, nothing but zeros
    shards = ShardSet(f"{server.uri}/test", options(tmp_path))
    assert np.array_equal(np.asarray(load_sample(shards, 3, 1).picture), expected)
    assert server.asked("000.tar" if what == "shard" else "000.idx.npy") == 2
    assert "has changed since it was fetched, fetching it again" in caplog.text
    assert file_sha256(copy) == copy.name
    copy.write_bytes(bytes(copy.stat().st_size))
    chunk = _Chunks(ShardSet(f"{server.uri}/test", options(tmp_path)), 1, 16)[0]
    assert isinstance(chunk, _Chunk) and not chunk.faults and np.array_equal(chunk.pixels[3, ..., 0], expected)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damage_of_a_web_store_is_listed(damage: str, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "test", tmp_path / "files" / "test")
    for lost in ("test-000000.tar", "test-000001.tar"):
        spoil(tmp_path / "files" / "test" / lost, damage)
    with FaultyServer(folder(tmp_path / "files")) as server:
        problems = verify(f"{server.uri}/test", workers=1)
        assert {problem.file for problem in problems} == {"test-000000.tar", "test-000001.tar"}
        server.fault = lambda request: "busy"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Unreachable, match="no success in 1 tries"):
            patch.setenv(TRIES, "1")
            verify(f"{server.uri}/test")


def test_a_picture_that_was_stored_damaged_is_fetched_once(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shard is what the manifest says, so there is nothing better to be had."""

    def no_picture(*args: object) -> None:
        raise UserError("can't be decoded")

    monkeypatch.setattr(loader_module, "decode_image", no_picture)
    shards = ShardSet(f"{server.uri}/test", options(tmp_path))
    for sample in (0, 1, 0):
        with pytest.raises(BadSample, match="can't be decoded"):
            load_sample(shards, sample, 1)
    assert server.asked("000.tar") == 1


# Fetching ahead.

SIZES = [(10, 100)] * 6  # samples and bytes of six shards


def test_coming_shards_in_the_order_of_their_need() -> None:
    coming = ComingShards(lambda step: [10 * step + 5, 10 * step + 10], SIZES, end=5)
    assert coming.after(0, 1000) == [0, 1, 2, 3, 4, 5]
    assert coming.after(2, 1000) == [2, 3, 4, 5]
    assert coming.after(2, 250) == [2, 3, 4, 5], "what was planned stays"
    assert coming.after(4, 1000) == [4, 5]
    assert coming.after(0, 1000) == [0, 1, 2, 3, 4, 5], "from the start again, as a second evaluation"
    assert ComingShards(lambda step: [10 * step + 5, 10 * step + 10], SIZES, end=5).after(0, 350) == [0, 1, 2]
    assert ComingShards(lambda step: [50, 3, 20, 4], SIZES, end=9).after(7, 1000) == [5, 0, 2]
    small = ComingShards(lambda step: [0, 10, 20], SIZES, end=5)
    assert small.after(0, 299) == [], "too little for one step: reading is left to those who read"
    assert small.after(1, 300) == [0, 1, 2]


def test_coming_shards_of_a_real_order() -> None:
    sizes = [(100 + number, 1000 + number) for number in range(40)]
    order = DataOrder([samples for samples, _ in sizes], seed=3, batch=32, lanes=4, window=64)
    looked: list[int] = []

    def samples_of(step: int) -> np.ndarray:
        looked.append(step)
        return order.step(step, 1, 2).samples

    coming = ComingShards(samples_of, sizes, end=2 * order.steps_per_epoch)
    ends = np.cumsum(order.shard_samples)
    for step in range(2 * order.steps_per_epoch):
        planned = coming.after(step, 12_000)
        needed = set(np.searchsorted(ends, order.step(step, 1, 2).samples, side="right").tolist())
        assert needed <= set(planned) and sum(sizes[shard][1] for shard in planned) <= 12_000
    # Every position once, and the one that has no room for its shards yet once more in each look.
    assert len(set(looked)) == 2 * order.steps_per_epoch and len(looked) < 5 * order.steps_per_epoch


class Labels(Dataset):
    """A batch is the labels of the samples of one step, in order."""

    def __init__(self, shards: ShardSet, batch: int) -> None:
        self.shards, self.batch = shards, batch

    def samples_of(self, step: int) -> range:
        return range(step * self.batch, min((step + 1) * self.batch, len(self.shards)))

    def __len__(self) -> int:
        return -(-len(self.shards) // self.batch)

    def __getitem__(self, step: int) -> torch.Tensor:
        return torch.tensor([sample.label for sample in self.shards.read(self.samples_of(step))])


def test_local_shards_need_no_fetching(digits: Path) -> None:
    dataset = Labels(ShardSet(digits / "test"), 10)
    assert fetched_ahead(dataset, dataset.shards, dataset.samples_of, 36, 0.5) is dataset


def wait_for(what: object, condition: object) -> None:
    deadline = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_shards_are_fetched_before_they_are_needed(
    server: FaultyServer, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead_module, "_PAUSE_SECONDS", 0.02)
    local = ShardSet(digits / "train").manifest.shards
    shards = ShardSet(f"{server.uri}/train", options(tmp_path, 1.0))
    assert isinstance(shards.files, CachedFiles)
    dataset = Labels(shards, 100)
    budget = sum(shard.bytes for shard in local[:4]) + 1000
    ahead = fetched_ahead(dataset, shards, dataset.samples_of, len(dataset), budget / 1e9)
    assert len(ahead) == len(dataset)  # type: ignore[arg-type]

    def fetched() -> list[int]:
        return [number for number in range(len(local)) if server.asked(f"{number:06d}.tar")]

    assert torch.equal(ahead[0], dataset[0])
    wait_for("the first four shards", lambda: fetched() == [0, 1, 2, 3])
    time.sleep(0.2)
    assert fetched() == [0, 1, 2, 3], "no more than the budget"
    assert torch.equal(ahead[4], dataset[4])
    wait_for("two more", lambda: fetched() == [0, 1, 2, 3, 4, 5])
    server.fault = lambda request: "denied"
    copy = pickle.loads(pickle.dumps(ahead))
    assert torch.equal(copy[9], dataset[9]), "this step reads what is here; the thread fails, and nobody is told"
    with pytest.raises(UserError, match="access denied"):
        copy[13]


def test_shards_behind_a_damaged_one_are_fetched_all_the_same(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead_module, "_PAUSE_SECONDS", 0.02)
    shutil.copytree(digits / "train", tmp_path / "files" / "train")
    spoil(tmp_path / "files" / "train" / "train-000001.tar", "flipped")
    spoil(tmp_path / "files" / "train" / "train-000002.tar", "gone")
    with FaultyServer(folder(tmp_path / "files")) as server:
        dataset = Labels(ShardSet(f"{server.uri}/train", options(tmp_path)), 100)
        fetched_ahead(dataset, dataset.shards, dataset.samples_of, len(dataset), 0.75)[0]
        wait_for("those behind", lambda: all(server.asked(f"{number:06d}.tar") for number in range(8)))


def test_loader_processes_share_the_downloads(
    server: FaultyServer, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "_PRELOAD", ["pipeline.data.ahead"])
    local = Labels(ShardSet(digits / "train"), 100)
    expected = [local[step] for step in range(len(local))]
    dataset = Labels(ShardSet(f"{server.uri}/train", options(tmp_path)), 100)
    source = fetched_ahead(dataset, dataset.shards, dataset.samples_of, len(dataset), 0.75)
    for _ in range(2):
        batches = list(Batches(source, range(len(dataset)), 2, 2, torch.device("cpu")))
        assert all(map(torch.equal, batches, expected)) and len(batches) == len(expected)
    for number in range(8):
        assert server.asked(f"{number:06d}.tar") == server.asked(f"{number:06d}.idx.npy") == 1
