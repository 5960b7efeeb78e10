"""A server of a store in a process of its own, with one bucket, `bucket`."""

from __future__ import annotations

import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.conftest import missing


class StoreServer:
    """Use as a context manager.

    Args:
        folder: gets the server's log.

    Attributes:
        name: of the store, in messages.
        packages: what server and client are made of.
        probe: method and path of a request that succeeds once the bucket is there.
    """

    name: str
    packages: tuple[str, ...]
    probe: tuple[str, str]

    def __init__(self, folder: Path) -> None:
        self._log = folder / "store.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    def arguments(self) -> list[str]:
        """Of Python, that start the server."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                missing(f"{self.name} left out: the package {package} is missing")
        with open(self._log, "wb") as log:
            command = [sys.executable, *self.arguments()]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.__exit__()
                missing(f"the server of {self.name} did not start\n{self._log.read_text()}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request(*self.probe)
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()
