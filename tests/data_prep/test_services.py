"""Stores of Google, Azure and Hugging Face through their own clients: what is done, asked again, and told."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

import data_prep.remote as remote_module
from data_prep.attempts import Patience
from data_prep.errors import DamagedFile, Unreachable, UserError
from data_prep.remote import RemoteStore
from tests.faulty_server import Answer, Fault, FaultyServer, Request
from tests.hub_server import hub
from tests.services import Service, service

PATIENT = Patience(tries=3, seconds=60, first_pause=0.01, longest_pause=0.02)
DATA = bytes(range(256)) * 40  # 10,240 bytes
MEND = {
    "gs": "run `gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS; for a public bucket",
    "abfs": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING",
    "hf": "set HF_TOKEN to a token that may read it, or run `hf auth login`",
}
DENIED = {"gs": json.dumps({"error": {"code": 401, "message": "Invalid Credentials"}}).encode()}

LOOKS = {"hf": 2}  # to name a file it asks whether that is a folder, and does without an answer


@pytest.fixture(scope="module", params=["gs", "abfs", "hf"])
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.fixture
def kept(started: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """The store with nothing wrong about its network."""
    monkeypatch.setitem(fsspec.config.conf, started.kind, started.options)
    answer = started.network.answer
    yield started
    started.network.answer, started.network.fault = answer, lambda request: None


@pytest.fixture
def store(kept: Service, request: pytest.FixtureRequest) -> RemoteStore:
    """A folder of this test in it, with a file `a.bin`."""
    name = request.node.originalname
    made = RemoteStore(f"{kept.address}/{name}", PATIENT)
    if kept.files is None:
        made.write("a.bin", DATA)
    else:
        (kept.files / name).mkdir(exist_ok=True)
        (kept.files / name / "a.bin").write_bytes(DATA)
    return made


def fetched(store: RemoteStore, file: str, size: int) -> bytes:
    with tempfile.TemporaryFile() as into:
        store.fetch(file, size, into.fileno())
        return into.read()


def test_what_is_written_is_there(kept: Service, store: RemoteStore, tmp_path: Path) -> None:
    if kept.files is not None:
        with pytest.raises(UserError, match=r"can't be written, for every file would be a commit.*`hf upload"):
            store.write("b.bin", DATA)
        with pytest.raises(UserError, match="can't be written"):
            store.remove("a.bin")
        return
    assert store.sizes("nowhere") == {}
    store.write("a.bin", b"old")
    store.write("a.bin", DATA)
    store.write(".prep/a.json", b"{}")
    store.below("sub").write("b.bin", b"b")
    large, made = os.urandom(6_000_000), tmp_path / "made"  # enough for more than one request to Google
    for data in (b"", large):
        made.write_bytes(data)
        store.publish(made, "c.bin")
        assert not made.exists() and store.read("c.bin") == data
    assert store.sizes() == {"a.bin": 10240, "c.bin": 6_000_000} and store.sizes(".prep") == {"a.json": 2}
    assert store.folders() == ["sub"] and store.read("sub/b.bin") == b"b"
    assert store.sha256("c.bin") == hashlib.sha256(large).hexdigest()
    store.remove("a.bin")
    store.remove("a.bin")
    assert store.sizes() == {"c.bin": 6_000_000}
    with pytest.raises(UserError, match=r"://nowhere/x/a.bin: can't be written \(.*; make the bucket or folder first"):
        RemoteStore(f"{kept.kind}://nowhere/x", PATIENT).write("a.bin", DATA)


def test_what_is_read(kept: Service, store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "PIECE", 2048)
    assert store.sizes() == {"a.bin": len(DATA)}
    before = len(kept.network.requests)
    assert fetched(store, "a.bin", len(DATA)) == DATA
    assert store.read_range("a.bin", 300, 100) == DATA[300:400]
    asked = [request.headers.get("x-ms-range") or request.headers.get("range") for request in kept.network.requests]
    pieces = {f"bytes={start}-{start + 2047}" for start in range(0, len(DATA), 2048)} | {"bytes=300-399"}
    assert {part for part in asked[before:] if part} == pieces, "not a byte more"
    assert store.read("a.bin") == DATA
    with pytest.raises(FileNotFoundError):
        store.read("b.bin")
    with pytest.raises(FileNotFoundError):
        store.read_range("b.bin", 0, 1)
    for start in (len(DATA) - 10, len(DATA) + 10):
        with pytest.raises(DamagedFile, match=rf"a.bin: 10240 bytes are there, {start + 100} are wanted"):
            store.read_range("a.bin", start, 100)
    if kept.files is not None:
        (kept.files / "test_what_is_read" / "b.bin").write_bytes(b"later")
    else:
        store.write("b.bin", b"later")
    assert store.read_range("b.bin", 1, 4) == b"ater" and store.read("b.bin") == b"later"


@pytest.mark.parametrize("fault", ["busy", "reset", "cut"])
def test_passing_failures_are_tried_again(fault: Fault, kept: Service, store: RemoteStore) -> None:
    failed: set[tuple[str, str]] = set()

    def once(request: Request) -> Fault | None:
        if (request.method, request.path) in failed:
            return None
        failed.add((request.method, request.path))
        return fault

    kept.network.fault = once
    store = RemoteStore(store._address, replace(PATIENT, tries=9))  # a list may take several requests
    assert fetched(store, "a.bin", len(DATA)) == DATA
    assert store.sizes() == {"a.bin": len(DATA)}
    if kept.files is None:
        store.write("b.bin", DATA)
        store.remove("b.bin")
    assert len(failed) > 1


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_lasting_failures_are_told(
    status: int, kept: Service, store: RemoteStore, capfd: pytest.CaptureFixture[str]
) -> None:
    """A try is one request, and no try of the library's own, so that number and pauses are those that are promised."""
    store.read("a.bin")  # from now on Hugging Face's client knows repository and folder
    kept.network.answer = lambda request: Answer(status)
    store = RemoteStore(store._address, PATIENT)
    before = len(kept.network.requests)
    with pytest.raises(Unreachable, match=r"a.bin: no success in 3 tries, the last: .*; see whether the store can be"):
        store.read("a.bin")
    assert len(kept.network.requests) - before == 3
    assert capfd.readouterr() == ("", ""), "one message, and no traceback of a library"


@pytest.mark.parametrize("status", [401, 403])
def test_what_does_not_pass_is_told_at_once(
    status: int, kept: Service, store: RemoteStore, capfd: pytest.CaptureFixture[str]
) -> None:
    kept.network.answer = lambda request: Answer(status, DENIED.get(kept.kind, b""))
    before = len(kept.network.requests)
    for call in (lambda: store.read("a.bin"), lambda: store.read_range("a.bin", 0, 9), store.sizes):
        with pytest.raises(UserError, match=r": access denied \(") as caught:
            call()
        assert caught.value.status == 2 and MEND[kept.kind] in str(caught.value)
    # A token of Google may have ended on its way, so it is asked once more.
    again = 3 if (kept.kind, status) == ("gs", 401) else 0
    assert 3 <= len(kept.network.requests) - before - again <= 2 * LOOKS.get(kept.kind, 1) + 1
    assert capfd.readouterr() == ("", "")


def test_a_store_that_can_only_be_read(kept: Service, store: RemoteStore) -> None:
    if kept.files is not None:
        return
    kept.network.fault = lambda request: "denied" if request.method not in ("GET", "HEAD") else None
    before = len(kept.network.requests)
    with pytest.raises(UserError, match=r"b.bin: access denied .*; (run `gcloud|set AZURE_STORAGE_ACCOUNT_NAME)"):
        store.write("b.bin", DATA)
    assert len(kept.network.requests) == before + 1 and store.read("a.bin") == DATA


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bin").write_bytes(DATA)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    with FaultyServer(hub(tmp_path / "set", token="hf_geheim")) as server:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.uri})
        yield server


def test_a_private_repository(repository: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub says of it that there is none; to whom gives a bad token, that this is bad."""
    address = "hf://datasets/me/set"
    for place in (address, "hf://datasets/you/set"):
        with pytest.raises(UserError, match=r"/a.bin: .*\(repository not found\).*If the repo is private") as caught:
            RemoteStore(place, PATIENT).read("a.bin")
        assert MEND["hf"] in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"access denied .*; set HF_TOKEN") as caught:
        RemoteStore(address, PATIENT).sizes()
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_geheim")
    store = RemoteStore(address, PATIENT)
    store._fs.invalidate_cache()  # of the process: it remembers that there is no such repository
    assert store.read("a.bin") == RemoteStore(f"{address}@main", PATIENT).read("a.bin") == DATA
    with pytest.raises(UserError, match=r"\(revision not found\)"):
        RemoteStore(f"{address}@v2", PATIENT).read("a.bin")


@pytest.fixture
def google_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """A service account, and the server that changes its key for tokens and has the bucket too."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    token = json.dumps({"access_token": "ya29.geheim", "expires_in": 3600, "token_type": "Bearer"}).encode()

    def answer(request: Request) -> Answer:
        if request.path == "/token":
            return Answer(200, token, {"Content-Type": "application/json"})
        granted = request.headers.get("authorization") == "Bearer ya29.geheim"
        return Answer(200, DATA) if granted else Answer(401, DENIED["gs"])

    with FaultyServer(answer) as server:
        account = {"type": "service_account", "private_key": pem.decode(), "client_email": "me@x.iam"}
        account |= {"token_uri": f"{server.uri}/token", "project_id": "x", "private_key_id": "1", "client_id": "1"}
        (tmp_path / "key.json").write_text(json.dumps(account))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        monkeypatch.setitem(fsspec.config.conf, "gs", {"endpoint_url": server.uri})
        yield server


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (None, None, ""),
        (Answer(400, b'{"error": "invalid_grant"}'), UserError, "access denied .*Invalid Credentials.*; run `gcloud"),
        (Answer(503), Unreachable, "no success in 1 tries"),
        ("reset", Unreachable, "no success in 1 tries"),
    ],
    ids=["good", "revoked", "busy", "reset"],
)
def test_keys_of_google(
    answer: Answer | str | None, error: type[UserError] | None, said: str, google_key: FaultyServer
) -> None:
    """What its client calls bad credentials may be a server for tokens that is not there for a while."""
    whole = google_key.answer
    if isinstance(answer, Answer):
        google_key.answer = lambda request: answer if request.path == "/token" else whole(request)
    if answer == "reset":
        google_key.fault = lambda request: "reset" if request.path == "/token" else None
    store = RemoteStore("gs://bucket/x", Patience(tries=1))
    if error is None:
        assert store.read("a.bin") == DATA
        return
    with pytest.raises(error, match=said) as caught:
        store.read("a.bin")
    assert type(caught.value) is error


def test_credentials_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith(("AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    with pytest.raises(UserError, match=r"abfs://c/x: unable to connect.*; set AZURE_STORAGE_ACCOUNT_NAME and"):
        RemoteStore("abfs://c/x", PATIENT).read("a")
    monkeypatch.setitem(fsspec.config.conf, "abfs", {"connection_string": "nonsense"})
    with pytest.raises(UserError, match=r"abfs://c/x: unable to connect.*; set AZURE_STORAGE_ACCOUNT_NAME and"):
        RemoteStore("abfs://c/x", PATIENT).read("a")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"GOOGLE_APPLICATION_CREDENTIALS=.*/none.json: no such file; name a key"):
        RemoteStore("gs://b/x", PATIENT).read("a")


@pytest.mark.parametrize("scheme", ["abfs", "abfss", "az"])
def test_a_container_before_the_account_is_no_secret(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, scheme, {"account_key": "a2V5", "anon": False})
    address = f"{scheme}://box@account.dfs.core.windows.net/set"
    store = RemoteStore(address, PATIENT)
    assert store.name == address and store.at("a.tar") == f"{address}/a.tar"
    assert store._path("a.tar") == "box/set/a.tar" and store._fs.account_name == "account"
    assert str(UserError(f"{scheme}://me:geheim@account/set is bad")) == f"{scheme}://***@account/set is bad"
