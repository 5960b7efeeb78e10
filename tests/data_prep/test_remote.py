"""Stores behind an address: what is read and written, what is tried again, what is told, and no secret in it."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import data_prep.remote as remote_module
from data_prep.attempts import SECONDS, TRIES, Patience
from data_prep.errors import DamagedFile, UserError
from data_prep.remote import RemoteStore
from data_prep.store import LocalStore, is_remote, local_path, open_store
from tests.faulty_server import Fault, FaultyServer, Request, folder

PATIENT = Patience(tries=4, seconds=60, first_pause=0.01, longest_pause=0.02)
QUICK = replace(PATIENT, seconds=2)  # for what hangs: no other request takes so long, also on a busy machine
DATA = bytes(range(256)) * 40  # 10,240 bytes


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.bin").write_bytes(DATA)
    return tmp_path / "files"


@pytest.fixture
def memory() -> Iterator[str]:
    """An address in the memory of this process."""
    yield "memory://bucket/set"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def fetched(store: RemoteStore, file: str, size: int) -> bytes:
    with tempfile.TemporaryFile() as into:
        store.fetch(file, size, into.fileno())
        return into.read()


@pytest.mark.parametrize(
    ("place", "remote"),
    [("s3://b/x", True), ("https://h/x?sig=1", True), ("file:///x", False), ("/x", False), ("a/b", False)],
)
def test_addresses_and_paths(place: str, remote: bool) -> None:
    assert is_remote(place) == remote
    assert isinstance(open_store(place), RemoteStore if remote else LocalStore)
    if place.startswith("file"):
        assert local_path("file:///a%20b/c") == Path("/a b/c")


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_what_is_written_is_there(kind: str, memory: str, tmp_path: Path) -> None:
    store = open_store(memory if kind == "memory" else tmp_path / "set")
    if kind == "local":
        (tmp_path / "set" / ".prep").mkdir(parents=True)
        (tmp_path / "set" / "sub").mkdir()
    assert store.sizes() == store.sizes("nowhere") == {}
    with pytest.raises(FileNotFoundError):
        store.read("a.bin")
    store.write("a.bin", b"old")
    store.write("a.bin", DATA)
    store.write(".prep/a.json", b"{}")
    store.below("sub").write("b.bin", b"b")
    made = tmp_path / "made"
    made.write_bytes(DATA[:5000])
    store.publish(made, "c.bin")
    assert not made.exists()
    assert store.sizes() == {"a.bin": 10240, "c.bin": 5000} and store.sizes(".prep") == {"a.json": 2}
    assert store.folders() == ["sub"]
    assert store.read("a.bin") == DATA and store.read("c.bin") == DATA[:5000] and store.read("sub/b.bin") == b"b"
    assert store.sha256("a.bin") == hashlib.sha256(DATA).hexdigest()
    store.remove("a.bin")
    store.remove("a.bin")
    assert store.sizes() == {"c.bin": 5000}


@pytest.mark.parametrize("piece", [1000, 1024, 10_239, 10_240, 10_241])
@pytest.mark.parametrize("ranges", [True, False])
def test_files_come_whole_in_pieces(piece: int, ranges: bool, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "PIECE", piece)
    with FaultyServer(folder(files, ranges)) as server:
        store = RemoteStore(server.uri, PATIENT)
        assert fetched(store, "a.bin", len(DATA)) == DATA
        assert server.asked("a.bin") == (-(-len(DATA) // piece) if ranges else 1)
        assert store.read_range("a.bin", 300, 100) == DATA[300:400] and store.read_range("a.bin", 7, 0) == b""
        assert store.read("a.bin") == DATA
    store = RemoteStore("memory://x", PATIENT)
    store.write("a.bin", DATA)
    assert fetched(store, "a.bin", len(DATA)) == DATA


@pytest.mark.parametrize("fault", ["busy", "reset", "stall", "cut"])
def test_passing_failures_are_tried_again(fault: Fault, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "PIECE", 2048)
    failed: set[str] = set()

    def once_for_each_range(request: Request) -> Fault | None:
        if request.headers.get("range", "") in failed:
            return None
        failed.add(request.headers.get("range", ""))
        return fault

    patience = QUICK if fault == "stall" else PATIENT
    with FaultyServer(folder(files), once_for_each_range) as server:
        assert fetched(RemoteStore(server.uri, patience), "a.bin", len(DATA)) == DATA
        assert server.asked("a.bin") == 2 * 5


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("busy", "no success in 4 tries, the last: ClientResponseError: 503"),
        ("reset", "no success in 4 tries"),
        ("stall", "no success in 4 tries, the last: .*in time"),
        ("cut", "no success in 4 tries"),
    ],
)
def test_lasting_failures_are_told(fault: Fault, said: str, files: Path) -> None:
    with FaultyServer(folder(files), lambda request: fault) as server:
        store = RemoteStore(f"{server.uri}/?sig=geheim", QUICK if fault == "stall" else PATIENT)
        began = time.monotonic()
        with pytest.raises(UserError, match=f"{said}.*; see whether the store can be reached") as caught:
            fetched(store, "a.bin", len(DATA))
        assert time.monotonic() - began < 4 * store.patience.seconds + 2
        assert server.asked("a.bin") == (8 if fault == "reset" else 4)  # aiohttp asks once more itself
        assert f"{server.uri}/a.bin?sig=***: no success" in str(caught.value) and "geheim" not in str(caught.value)


def test_what_does_not_pass_is_told_at_once(files: Path) -> None:
    with FaultyServer(folder(files), lambda request: "denied" if "a.bin" in request.path else None) as server:
        store = RemoteStore(server.uri.replace("://", "://me:geheim@"), PATIENT)
        with pytest.raises(UserError, match=r"\*\*\*@.*a.bin: access denied .*403.*; give an address that holds") as e:
            store.read("a.bin")
        assert "geheim" not in str(e.value)
        with pytest.raises(FileNotFoundError):
            store.read("b.bin")
        assert [len([r for r in server.requests if name in r.path]) for name in ("a.bin", "b.bin")] == [1, 1]
        assert server.requests[0].headers["authorization"].startswith("Basic ")
        with pytest.raises(UserError, match="can't be written; choose an OUT on s3://"):
            store.write("c.bin", b"")


def test_a_shorter_file_is_a_damaged_one(files: Path) -> None:
    with (
        FaultyServer(folder(files)) as server,
        pytest.raises(DamagedFile, match=r"10240 bytes are there, 10241 are wanted"),
    ):
        fetched(RemoteStore(server.uri, PATIENT), "a.bin", len(DATA) + 1)


class Sluggish(MemoryFileSystem):
    """A file system without asyncio, as Hugging Face's, of which the first two calls hang or fail."""

    protocol = "sluggish"
    calls = 0
    failure: Any = None

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        Sluggish.calls += 1
        if Sluggish.calls <= 2:
            if Sluggish.failure is None:
                time.sleep(2 * QUICK.seconds)
            else:
                raise Sluggish.failure
        return bytes(super().cat_file(path, start, end, **options))


def made(name: str, module: str, **attributes: Any) -> Exception:
    """An exception as a client library raises it."""
    kind = type(name, (Exception,), {"__module__": module} | attributes)
    return kind("some words")


S3_MEND = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (None, None),
        (ConnectionResetError(104, "reset"), None),
        (OSError(16, "Please reduce your request rate."), None),
        (made("EndpointConnectionError", "botocore.exceptions"), None),
        (made("ConnectError", "httpx2"), None),
        (made("HttpError", "gcsfs.retry", code=503), None),
        (made("HfHubHTTPError", "huggingface_hub.errors", response=type("R", (), {"status_code": 429})), None),
        (RuntimeError("Cannot send a request, as the client has been closed."), None),
        (OSError("Forbidden: b/x"), "access denied (Forbidden: b/x)"),
        (type("OfflineModeIsEnabled", (ConnectionError,), {})("offline"), "offline; see"),
        (made("ResourceExistsError", "azure.core.exceptions", status_code=409), "ResourceExistsError: some words"),
        (PermissionError("Access Denied"), "access denied (Access Denied)"),
        (made("NoCredentialsError", "botocore.exceptions"), "no credentials that could be used (NoCredentialsError:"),
        (made("HttpError", "gcsfs.retry", code="401"), "access denied (HttpError: some words)"),
        (made("ClientError", "botocore", response={"ResponseMetadata": {"HTTPStatusCode": 416}}), "ClientError: some"),
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_is_tried_again(failure: Exception | None, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("sluggish", Sluggish, clobber=True)
    monkeypatch.setattr(Sluggish, "calls", 0)
    monkeypatch.setattr(Sluggish, "failure", failure)
    store = RemoteStore("sluggish://b/x", QUICK if failure is None else PATIENT)
    store.protocol = "s3"
    store.write("a.bin", DATA)
    if said is None:
        assert store.read("a.bin") == DATA and Sluggish.calls == 3
        return
    with pytest.raises(UserError) as caught:
        store.read("a.bin")
    assert Sluggish.calls == 1 and f"sluggish://b/x/a.bin: {said}" in str(caught.value)
    assert (S3_MEND in str(caught.value)) == ("credentials" in said or "denied" in said)


def test_tries_come_later_and_later_and_not_together() -> None:
    patience = Patience(first_pause=1, longest_pause=10)
    pauses = [[patience.pause(attempt) for attempt in range(1, 8)] for _ in range(50)]
    for several, whole in zip(zip(*pauses, strict=True), (1, 2, 4, 8, 10, 10, 10), strict=True):
        assert whole / 2 <= min(several) < max(several) <= whole and len(set(several)) == 50


def test_patience_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Patience.of_environment() == Patience()
    monkeypatch.setenv(TRIES, "3")
    monkeypatch.setenv(SECONDS, "1.5")
    assert (Patience.of_environment().tries, Patience.of_environment().seconds) == (3, 1.5)
    for variable, value in ((TRIES, "0"), (TRIES, "0.5"), (SECONDS, "-1"), (SECONDS, "many"), (SECONDS, "inf")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=f"{variable}={value}: write a number"):
            patch.setenv(variable, value)
            Patience.of_environment()


@pytest.mark.parametrize(
    ("url", "shown", "options"),
    [
        ("s3://AKIA:ab/c+d@bucket/x", "s3://***@bucket/x", {"key": "AKIA", "secret": "ab/c+d"}),
        ("s3://AKIA:ab%2Fc%40d@bucket/x", "s3://***@bucket/x", {"key": "AKIA", "secret": "ab/c@d"}),
        ("s3://***@bucket/x", "s3://***@bucket/x", {}),
        ("s3://bucket/x", "s3://bucket/x", {}),
        ("hf://datasets/me/set@main/x", "hf://datasets/me/set@main/x", {}),
        ("https://me:pw@host/x", "https://***@host/x", {}),
        ("https://host/x?sv=1&sig=ab%2B", "https://host/x?sv=1&sig=***", {}),
    ],
)
def test_credentials_of_addresses_are_used_and_hidden(url: str, shown: str, options: dict[str, str]) -> None:
    store = RemoteStore(f"{url}/" if url.endswith("/x") else url)
    assert store.name == (shown.replace("***@", "") if url.startswith("s3") else shown)
    assert store._options == store.below("sub")._options == options
    assert store.at("f.tar") == store.name.replace("/x", "/x/f.tar")
    assert str(UserError(f"{url} is bad")) == f"{shown} is bad"


@pytest.mark.parametrize(
    ("scheme", "package"), [("gs", "gcsfs"), ("abfs", "adlfs"), ("abfss", "adlfs"), ("hf", "huggingface_hub")]
)
def test_a_missing_package_is_named(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(UserError, match=rf"{scheme}://b/x: a package is missing .*; pip install {package}"):
        RemoteStore(f"{scheme}://b/x").read("a")
    with pytest.raises(UserError, match=r"ftpx://b: .*; use s3://, gs://"):
        RemoteStore("ftpx://b").read("a")


def test_a_store_can_be_sent_to_another_process(memory: str) -> None:
    store = RemoteStore(memory, PATIENT)
    store.write("a.bin", DATA)
    copy = pickle.loads(pickle.dumps(store))
    assert copy._connected is None and copy.read("a.bin") == DATA and copy.patience == PATIENT


def test_no_thread_outlives_a_failure_for_long(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pieces of a file one fails for good. The file they were written into is closed, and another one opened."""
    monkeypatch.setattr(remote_module, "PIECE", 1024)
    before = threading.active_count()

    def fault(request: Request) -> Fault | None:
        return "denied" if request.headers.get("range", "").startswith("bytes=4096-") else None

    with FaultyServer(folder(files), fault) as server:
        store = RemoteStore(server.uri, PATIENT)
        for _ in range(20):
            with pytest.raises(UserError, match="access denied"):
                fetched(store, "a.bin", len(DATA))
            with open(files / "other", "w+b") as other:
                time.sleep(0.005)
                assert os.fstat(other.fileno()).st_size == 0
    deadline = time.monotonic() + 10
    while threading.active_count() > before + 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before + 4
