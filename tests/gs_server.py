"""A stand-in for Google Cloud Storage that speaks its JSON interface: gcp-storage-emulator, in a process of its own."""

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


class GoogleServer:
    """Use as a context manager; holds one bucket, `bucket`.

    Args:
        folder: gets the server's log.
    """

    def __init__(self, folder: Path) -> None:
        self._log = folder / "gs.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    def __enter__(self) -> GoogleServer:
        for package in ("gcp_storage_emulator", "gcsfs"):
            if importlib.util.find_spec(package) is None:
                missing(f"Google Cloud Storage left out: the package {package} is missing")
        command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--in-memory", "--default-bucket", "bucket"]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                missing(f"the emulator of Google Cloud Storage did not start\n{self._log.read_text()}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/storage/v1/b/bucket")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()
