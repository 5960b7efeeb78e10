"""A stand-in for Azure Blob Storage: the few answers of it that shards take, made up after its client.

With ROOKERY_AZURITE=`command` the real emulator answers instead: `npm install azurite`, then
`ROOKERY_AZURITE="node node_modules/azurite/dist/src/blob/main.js"`.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.conftest import missing
from tests.faulty_server import Answer, Request, another

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # known to everybody
_DATE = "Mon, 30 Nov 2026 00:00:00 GMT"


def connection_string(uri: str, key: str = KEY) -> str:
    """What AZURE_STORAGE_CONNECTION_STRING takes."""
    return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key};BlobEndpoint={uri}/{ACCOUNT};"


@contextmanager
def azure(folder: Path) -> Iterator[Callable[[Request], Answer]]:
    """Answers for an account without containers.

    Args:
        folder: gets the log of the real emulator.
    """
    if importlib.util.find_spec("adlfs") is None:
        missing("Azure left out: the package adlfs is missing")
    command = os.environ.get("ROOKERY_AZURITE")
    if not command:
        yield Blobs()
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    options = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence", "--disableTelemetry"]
    with open(folder / "azurite.log", "wb") as log:
        whole = [*shlex.split(command), *options, "--skipApiVersionCheck"]
        process = subprocess.Popen(whole, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    missing(f"Azurite did not start\n{(folder / 'azurite.log').read_text()}")
                time.sleep(0.1)
        yield another(port)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Blobs:
    """Containers and their blobs, in memory. Signatures are not looked at, and lists come whole."""

    def __init__(self) -> None:
        self._containers: dict[str, dict[str, bytes]] = {}
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Answer:
        with self._lock:
            answer = self._answer(request)
        return Answer(answer.status, answer.body, {"x-ms-version": "2021-12-02", "Date": _DATE} | answer.headers)

    def _answer(self, request: Request) -> Answer:
        query = {name: values[0] for name, values in parse_qs(urlsplit(request.path).query).items()}
        path = unquote(urlsplit(request.path).path).removeprefix(f"/{ACCOUNT}/")
        container, _, name = path.partition("/")
        if not name and request.method == "PUT":
            self._containers.setdefault(container, {})
            return Answer(201, b"", _marks())
        blobs = self._containers.get(container)
        if blobs is None:
            return _error(404, "ContainerNotFound", "The specified container does not exist.")
        if not name:
            return _list(container, blobs, query) if query.get("comp") == "list" else Answer(200, b"", _marks())
        if request.method == "PUT":
            assert "comp" not in query, "blocks are for what is larger than any test's shard"
            blobs[name] = request.body
            return Answer(201, b"", _marks())
        if name not in blobs:
            return _error(404, "BlobNotFound", "The specified blob does not exist.")
        if request.method == "DELETE":
            del blobs[name]
            return Answer(202)
        return _blob(request, blobs[name])


def _blob(request: Request, data: bytes) -> Answer:
    marks = _marks() | {"x-ms-blob-type": "BlockBlob"}
    if request.method == "HEAD":
        return Answer(200, b"", marks | {"Content-Length": str(len(data))})
    asked = request.headers.get("x-ms-range") or request.headers.get("range")
    if not asked:
        return Answer(200, data, marks)
    first, _, last = asked.removeprefix("bytes=").partition("-")
    part = data[int(first) : int(last or len(data)) + 1]
    if not part:
        return _error(416, "InvalidRange", "The range specified is invalid for the current size of the resource.")
    where = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
    return Answer(206, part, marks | {"Content-Range": where})


def _list(container: str, blobs: dict[str, bytes], query: dict[str, str]) -> Answer:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    below = sorted(name for name in blobs if name.startswith(prefix))
    found, folders = [], set()
    for name in below:
        folder, inside, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
        if inside:
            folders.add(prefix + folder + inside)
            continue
        size = f"<Content-Length>{len(blobs[name])}</Content-Length><BlobType>BlockBlob</BlobType>"
        marks = f'<Last-Modified>{_DATE}</Last-Modified><Etag>"1"</Etag>'
        found.append(f"<Blob><Name>{escape(name)}</Name><Properties>{marks}{size}</Properties></Blob>")
    found += [f"<BlobPrefix><Name>{escape(name)}</Name></BlobPrefix>" for name in sorted(folders)]
    text = f"<Blobs>{''.join(found)}</Blobs><NextMarker/>"
    text = f'<EnumerationResults ContainerName="{container}">{text}</EnumerationResults>'
    return Answer(200, f'<?xml version="1.0" encoding="utf-8"?>{text}'.encode(), {"Content-Type": "application/xml"})


def _marks() -> dict[str, str]:
    return {"ETag": '"1"', "Last-Modified": _DATE, "Content-Type": "application/octet-stream"}


def _error(status: int, code: str, words: str) -> Answer:
    text = f"<Error><Code>{code}</Code><Message>{words}\nRequestId:1</Message></Error>"
    headers = {"x-ms-error-code": code, "Content-Type": "application/xml"}
    return Answer(status, f'<?xml version="1.0" encoding="utf-8"?>{text}'.encode(), headers)
