"""A real S3 server: moto's, in a process of its own."""

from __future__ import annotations

import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import missing


class S3Server:
    """Use as a context manager; holds one bucket, `bucket`.

    Args:
        folder: gets the server's log.
    """

    def __init__(self, folder: Path) -> None:
        self._log = folder / "s3.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    def __enter__(self) -> S3Server:
        for package in ("moto", "s3fs", "flask_cors"):
            if importlib.util.find_spec(package) is None:
                missing(f"S3 left out: the package {package} is missing")
        with open(self._log, "wb") as log:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while not self._has_bucket():
            if time.monotonic() > deadline or self._process.poll() is not None:
                missing(f"the S3 server did not start\n{self._log.read_text()}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _has_bucket(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("PUT", "/bucket")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()
