"""Preparing into a store: the bytes of a local preparation, killed at any request, and verified where they lie."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_prep.errors import UserError
from data_prep.manifest import Manifest, load_index
from data_prep.prepare import prepare
from data_prep.remote import RemoteStore
from data_prep.state import STATE_FOLDER, SplitState
from data_prep.store import open_store
from data_prep.verify import split_directories, verify
from tests.data_prep.helpers import TEXT, digests, make_folder, options
from tests.faulty_server import FaultyServer, folder

OUT = "memory://bucket/out"


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty memory file system, and a folder of the test for what is being made."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def download(place: str, into: Path) -> Path:
    """Copy what a store holds in a split."""
    store = open_store(place)
    into.mkdir(parents=True)
    for file in store.sizes():
        (into / file).write_bytes(store.read(file))
    return into


def test_the_bytes_are_those_of_a_folder(source: Path, tmp_path: Path) -> None:
    local = prepare(source, tmp_path / "local", options())
    assert prepare(source, OUT, options()) == local == Manifest.load(f"{OUT}/train")
    assert Manifest.load(f"{OUT}/train/manifest.json") == local
    assert digests(download(f"{OUT}/train", tmp_path / "copy")) == digests(tmp_path / "local" / "train")
    records = set(open_store(OUT).below("train").sizes(STATE_FOLDER))
    assert records == {"plan.json", *(f"{shard.file}.json" for shard in local.shards)}
    left = [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["lock"]


class Killed(BaseException):
    """Stands for kill -9: nothing of the code handles it."""


class Kill:
    """Counts what is done to stores, and ends it before the `step`-th time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step = self.calls = 0
        self.uploads: list[str] = []
        whole = RemoteStore._call

        def call(store: RemoteStore, method: str, *args: Any, **more: Any) -> Any:
            self.calls += 1
            if self.calls == self.step:
                raise Killed
            if method == "put_file":
                self.uploads.append(args[2].rpartition("/")[2])
            return whole(store, method, *args, **more)

        monkeypatch.setattr(RemoteStore, "_call", call)


def test_killed_at_every_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "source", ("ant", "bee"), per_class=3)
    (source / "ant" / "bad.jpg").write_bytes(TEXT)
    prepare(source, tmp_path / "local", options())
    expected = digests(tmp_path / "local" / "train")
    kill, step = Kill(monkeypatch), 0
    while True:
        step += 1
        out = f"memory://bucket/out{step}"
        kill.step, kill.calls = step, 0
        try:
            prepare(source, out, options())
            break
        except Killed:
            kill.step, before = 0, len(kill.uploads)
            records = set(open_store(f"{out}/train").sizes(STATE_FOLDER)) - {"plan.json"}
            prepare(source, out, options())
            assert len(kill.uploads) - before == 2 * (2 - len(records)), "only what is missing"
            copy = download(f"{out}/train", tmp_path / f"copy{step}")
            assert digests(copy) == expected, f"killed at request {step}"
            assert verify(out) == []
    assert step > 15


def test_a_finished_one_is_left_alone_and_another_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(source, OUT, options())
    kill = Kill(monkeypatch)
    prepare(source, OUT, options())
    assert kill.uploads == []
    with pytest.raises(UserError, match=r"memory://bucket/out/train: the shards here were made otherwise \(quality"):
        prepare(source, OUT, options(quality=80))
    prepare(source, OUT, options(resize=20, overwrite=True))
    assert verify(OUT) == [] and len(kill.uploads) == 8
    open_store("memory://bucket/foreign/train").write("x.tar", b"")
    with pytest.raises(UserError, match=r"memory://bucket/foreign/train: holds x.tar that no preparation recorded"):
        prepare(source, "memory://bucket/foreign", options())


def test_damage_is_found_and_repaired(source: Path) -> None:
    manifest = prepare(source, OUT, options())
    store = open_store(f"{OUT}/train")
    first, second, third = (shard.file for shard in manifest.shards[:3])
    store.write(first, store.read(first)[:-1])
    store.write(second, store.read(second)[:-1] + b"x")
    store.remove(third)
    store.remove(manifest.shards[3].index_file)
    store.write("more.tar", TEXT)
    found = {problem.file: problem.what for problem in verify(OUT)}
    assert found == {
        "more.tar": "not in the manifest",
        first: f"{manifest.shards[0].bytes - 1} bytes, the manifest says {manifest.shards[0].bytes}",
        second: "its contents have changed: the sha256 differs",
        third: "missing",
        manifest.shards[3].index_file: "missing",
    }
    assert prepare(source, OUT, options(repair=True)) == manifest
    assert [problem.file for problem in verify(OUT)] == ["more.tar"]


def test_two_at_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one machine the second is refused; of two machines the one whose plan was replaced writes no manifest."""
    with SplitState(f"{OUT}/train").locked(), pytest.raises(UserError, match="another `rookery prep` is writing here"):
        prepare(source, OUT, options())
    publish = SplitState.publish

    def taken_over(state: SplitState, *args: Any) -> None:
        publish(state, *args)
        state.store.write(f"{STATE_FOLDER}/plan.json", b'{"fingerprint": "another"}')

    monkeypatch.setattr(SplitState, "publish", taken_over)
    with pytest.raises(UserError, match="another `rookery prep` with other options or another source has written here"):
        prepare(source, OUT, options())
    assert "manifest.json" not in open_store(f"{OUT}/train").sizes()


def test_what_is_not_there(source: Path) -> None:
    with pytest.raises(UserError, match=r"memory://bucket/out: nothing here was made by `rookery prep`"):
        verify(OUT)
    prepare(source, OUT, options())
    assert [split.name for split in split_directories(OUT)] == [f"{OUT}/train"]
    with pytest.raises(UserError, match=r"no such manifest, but the directory holds the splits train; name one"):
        Manifest.load(OUT)
    with pytest.raises(UserError, match=r"memory://bucket/other/manifest.json: no such manifest; make the shards"):
        Manifest.load("memory://bucket/other")


def test_a_web_server_can_be_verified(source: Path, tmp_path: Path) -> None:
    """A damage on the way to here is none of the shards; and only a split can be named."""
    out = tmp_path / "local"
    manifest = prepare(source, out, options())
    damaged = {"train-000001.tar": 2, "manifest.json": 2, "train-000002.idx.npy": 1}

    def fault(request: Any) -> Any:
        name = request.path.rpartition("/")[2]
        damaged[name] = damaged.get(name, 0) - 1
        return "corrupt" if damaged[name] >= 0 else None

    with FaultyServer(folder(out), fault) as server:
        assert verify(f"{server.uri}/train", workers=1) == []
        assert server.asked("train-000001.tar") == 3 and server.asked("train-000000.tar") == 1
        index = manifest.shards[0].index_file
        np.save(out / "train" / index, np.array(load_index(out / "train", manifest.shards[0]))[::-1])
        (out / "train" / "train-000001.tar").unlink()
        problems = [(problem.file, problem.what) for problem in verify(f"{server.uri}/train", workers=1)]
        assert problems == [
            (index, "its contents have changed: the sha256 differs"),
            ("train-000001.tar", "missing, or its index is"),
        ]
        [problem] = verify(server.uri)
        assert "manifest.json: no such manifest" in problem.what
        with pytest.raises(UserError, match="can't be written; choose an OUT on s3://"):
            prepare(source, f"{server.uri}/new", options())
    assert not list((tmp_path / "scratch").glob("rookery-verify-*"))
