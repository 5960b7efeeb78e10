"""A web server that fails on purpose: it serves a folder, or passes requests on to another server."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

Fault = Literal["busy", "denied", "reset", "stall", "cut", "corrupt"]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def folder(root: Path, ranges: bool = True) -> Callable[[Request], Answer]:
    """Answers with the files below a folder; without `ranges` always with whole ones, as `python -m http.server`."""

    def answer(request: Request) -> Answer:
        path = root / unquote(urlsplit(request.path).path).lstrip("/")
        if not path.is_file():
            return Answer(404)
        data = path.read_bytes()
        asked = request.headers.get("range", "")
        if not ranges or not asked:
            return Answer(200, data)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1]
        if not part:
            return Answer(416)
        where = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        return Answer(206, part, {"Content-Range": where})

    return answer


def another(port: int) -> Callable[[Request], Answer]:
    """Answers with what another server of this machine says."""

    def answer(request: Request) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request(request.method, request.path, request.body, request.headers)
            response = connection.getresponse()
            body = response.read()
            left_out = ("connection", "transfer-encoding", "content-length", "date", "server")
            headers = {name: value for name, value in response.getheaders() if name.lower() not in left_out}
            if request.method == "HEAD":
                headers["Content-Length"] = response.headers.get("content-length", "0")
            return Answer(response.status, body, headers)
        finally:
            connection.close()

    return answer


class Faults:
    """Draws a fault for some of the requests.

    Args:
        seed: of the draws.
        failing: part of the requests that get a 503 or a reset connection.
        stalling: part of them whose answer stops half-way.
        corrupted: end of the path of the file that arrives with a flipped bit the first time.
    """

    def __init__(self, seed: int, failing: float = 0.0, stalling: float = 0.0, corrupted: str | None = None) -> None:
        self._draw, self._lock = random.Random(seed), threading.Lock()
        self.failing, self.stalling, self.corrupted = failing, stalling, corrupted
        self.made: list[tuple[Fault, str]] = []

    def __call__(self, request: Request) -> Fault | None:
        with self._lock:
            fault = self._chosen(request)
            if fault is not None:
                self.made.append((fault, request.path))
            return fault

    def _chosen(self, request: Request) -> Fault | None:
        path = urlsplit(request.path).path
        if self.corrupted is not None and request.method == "GET" and path.endswith(self.corrupted):
            self.corrupted = None
            return "corrupt"
        drawn = self._draw.random()
        if drawn < self.failing:
            return "busy" if self._draw.random() < 0.5 else "reset"
        return "stall" if drawn < self.failing + self.stalling else None


class FaultyServer:
    """Use as a context manager.

    Args:
        answer: what to say to a request.
        fault: what to do wrong about it; None: nothing.

    Attributes:
        requests: all that came.
        stall_seconds: how long an answer that stalls does not go on.
    """

    def __init__(
        self, answer: Callable[[Request], Answer], fault: Callable[[Request], Fault | None] = lambda request: None
    ) -> None:
        self.answer, self.fault = answer, fault
        self.requests: list[Request] = []
        self.stall_seconds = 30.0
        self._ended = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultyServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def asked(self, end: str, method: str = "GET") -> int:
        """How often files whose path ends so were asked for."""
        return sum(
            request.method == method and urlsplit(request.path).path.endswith(end) for request in list(self.requests)
        )


class _Handler(BaseHTTPRequestHandler):
    owner: FaultyServer
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        self.owner.requests.append(request)
        fault = self.owner.fault(request)
        if fault == "reset":
            # Closed with nothing to linger for, a connection is reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault in ("busy", "denied"):
            self._send(Answer(503 if fault == "busy" else 403))
            return
        self._send(self.owner.answer(request), fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _send(self, answer: Answer, fault: Fault | None = None) -> None:
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
            if fault != "corrupt" or "checksum" not in name:  # which some servers send, and some clients compare
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = answer.body
        if fault == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault in ("stall", "cut"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.owner._ended.wait(self.owner.stall_seconds)
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            return  # the client has gone

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            return
