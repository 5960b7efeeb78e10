"""The `rookery train` of a trial on one node, and what it has measured."""

from __future__ import annotations

import math
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.slurm_script import executable
from pipeline.tracking.files import parse_line
from pipeline.tracking.metrics import METRICS_NAME
from pipeline.train.again import AGENT_PID

LOGS = "logs"
_SHOWN_LINES = 8


class NodeProcess:
    """`rookery train` on this node. It ends with the process that started it, however that one ends.

    Args:
        folder: the working directory.
        environment: added to that of this process.
    """

    def __init__(self, folder: str, environment: dict[str, str]) -> None:
        self._folder = folder
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, arguments: Sequence[str], log: str) -> None:
        """Start it; what it prints is added to the log."""
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        own = {AGENT_PID: str(os.getpid())}
        with open(log, "ab") as out:
            self._process = subprocess.Popen(
                [executable(), "train", *arguments],
                cwd=self._folder,
                env=os.environ | self._environment | own,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C is for the sweep, which passes it on
            )

    def poll(self) -> int | None:
        """Its exit status; None while it runs. A signal that killed it is negative."""
        assert self._process is not None, "start() comes first"
        return self._process.poll()

    def send(self, number: int) -> None:
        """Send it a signal, which it passes on to its workers; SIGKILL takes them along."""
        assert self._process is not None, "start() comes first"
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                (os.killpg if number == signal.SIGKILL else os.kill)(self._process.pid, number)

    def wait(self, seconds: float) -> int | None:
        """Its exit status; None if it still runs after so many seconds."""
        assert self._process is not None, "start() comes first"
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None


class Evaluations:
    """Reads a growing `metrics.jsonl`, which a start after a kill may shorten, and gives each evaluation once.

    Args:
        run: the run directory; it need not exist yet.
        seen: step of the last evaluation that is known already.
        until: later ones are left out.
    """

    def __init__(self, run: Path, seen: int, until: float = math.inf) -> None:
        self.seen = seen
        self._until = until
        self._path = run / METRICS_NAME
        self._offset, self._inode = 0, 0
        self._waiting: list[dict[str, Any]] = []
        self._images_per_second: float | None = None

    def next(self) -> dict[str, Any] | None:
        """The figures of the next evaluation, with `step`, `epoch` and the speed of training; None if there is none."""
        self._read()
        while self._waiting:
            line = self._waiting.pop(0)
            if self.seen < line["step"] <= self._until:
                self.seen = line["step"]
                return line
        return None

    def _read(self) -> None:
        try:
            file = open(self._path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            for raw in file:
                line = parse_line(raw)
                if line is None and not raw.endswith(b"\n"):
                    return
                self._offset += len(raw)
                self._take(line or {})

    def _take(self, line: dict[str, Any]) -> None:
        if line.get("kind") == "train":
            self._images_per_second = line.get("images_per_second")
        elif line.get("kind") == "eval":
            figures = {key: value for key, value in line.items() if key not in ("kind", "time")}
            self._waiting.append(figures | {"images_per_second": self._images_per_second})


def end_of(log: Path) -> str:
    """The last lines of a log."""
    if not log.exists():
        return "it left no log"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-_SHOWN_LINES:]) or "it printed nothing"
