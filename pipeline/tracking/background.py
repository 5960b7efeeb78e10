"""Keeps MLflow up to date while a run trains, without costing it anything.

The upload runs in a child process of low priority rather than in a thread: mlflow holds the interpreter lock
while it is imported (3-4 s) and for milliseconds per batch, and a training step that launches hundreds of small
operations waits for the lock at each of them. docs/tracking.md has the measurement.

Run as `python -m pipeline.tracking.background` it is that child: settings and "end" messages arrive on standard input,
notices leave on standard output, both as JSON lines.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.tracking.mlflow_mirror import Mirror
from pipeline.tracking.run_dir import EndStatus

_log = logging.getLogger(__name__)
_CODE = Path(__file__).resolve().parents[2]
_LONGEST_WAIT = 60.0
_REMIND = 600.0
_ORPHAN_SECONDS = 60
# Importing mlflow and making a database takes about 6 s of processor time, once. At the lowest priority that would be
# minutes where training uses every core, and a short run would be over before.
_NICE_START = 5


class BackgroundMirror:
    """A `Mirror` that pushes every few seconds from a process of its own, until `close`.

    A server that is down, slow or wrong never delays or raises into the training: `warn` is told once, then every ten
    minutes while it lasts; attempts become rarer, up to one per minute. If the training is killed, the child uploads
    what is left, marks the MLflow run as killed and goes.

    Args:
        run_dir, tracking_uri, experiment, run_name, tags, params: see `Mirror`.
        interval: seconds between pushes.
        warn: called with a message from another thread; the default logs a warning.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tracking_uri: str | None = None,
        experiment: str | None = None,
        run_name: str | None = None,
        tags: dict[str, str] | None = None,
        params: dict[str, Any] | None = None,
        *,
        interval: float = 5.0,
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        self._run = Path(run_dir)
        self._warn = warn
        self._complete = False
        mirror = {
            "run_dir": str(run_dir),
            "tracking_uri": tracking_uri,
            "experiment": experiment,
            "run_name": run_name,
            "tags": tags,
            "params": params,
        }
        path = os.pathsep.join(filter(None, (str(_CODE), os.environ.get("PYTHONPATH"))))
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # The upload needs no GPU, and one thread is enough for it.
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        self._send({"mirror": mirror, "interval": interval})
        self._reader = threading.Thread(target=self._read, name="mlflow-notices", daemon=True)
        self._reader.start()

    def close(self, status: EndStatus = "finished", timeout: float = 30.0) -> bool:
        """Upload the rest, mark the MLflow run FINISHED, FAILED or KILLED, and end the child.

        Call it after the run's last line and `result.json` are written.

        Args:
            status: how the run ended.
            timeout: seconds to wait for the upload.

        Returns:
            Whether MLflow now has everything; if not, `warn` was told and `rookery sync` uploads the rest.
        """
        if self._child.poll() is None:
            self._send({"end": status})
        try:
            self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._reader.join(timeout=1)
        if not self._complete:
            self._warn(f"MLflow doesn't have all of this run yet; `rookery sync {self._run}` uploads the rest")
        return self._complete

    def _send(self, message: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        # Should the child be gone, `close` notices.
        with contextlib.suppress(OSError):
            self._child.stdin.write(json.dumps(message, default=str) + "\n")
            self._child.stdin.flush()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            message = json.loads(line)
            if "warn" in message:
                self._warn(message["warn"])
            self._complete = message.get("complete", self._complete)


class _Child:
    """The loop of the uploading process."""

    def __init__(self, notify: Callable[[dict[str, Any]], None]) -> None:
        self._notify = notify
        self._parent = os.getppid()
        self._inbox: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._starting = True
        self._told: set[str] = set()
        self._failed_at: float | None = None
        self._warned_at = -_REMIND
        threading.Thread(target=self._listen, daemon=True).start()

    def run(self) -> None:
        settings = self._inbox.get()
        if settings is None:
            return
        mirror = Mirror(**settings["mirror"])
        wait = interval = settings["interval"]
        while True:
            wait = interval if self._push(mirror.push) else min(2 * wait, _LONGEST_WAIT)
            message = self._next_message(wait)
            if message is None:
                self._after_parent(mirror)
                return
            if "end" in message:
                self._notify({"complete": self._push(partial(mirror.push, message["end"]))})
                return

    def _push(self, push: Callable[[], Any]) -> bool:
        """One attempt; tells the parent what it should know."""
        now = time.monotonic()
        try:
            report = push()
        except UserError as error:
            if now - self._warned_at >= _REMIND:
                self._warned_at = now
                self._notify({"warn": f"{error}; training goes on, metrics stay in the run directory"})
            self._failed_at = self._failed_at or now
            return False
        if self._starting:
            self._starting = False
            os.nice(19)
        for notice in report.notices:
            if notice not in self._told:
                self._told.add(notice)
                self._notify({"warn": notice})
        if self._failed_at is not None:
            self._notify({"warn": f"MLflow at {report.uri} works again; all is uploaded"})
            self._failed_at, self._warned_at = None, -_REMIND
        return True

    def _next_message(self, wait: float) -> dict[str, Any] | None:
        """What the parent says within `wait` seconds: `{}` for nothing, None when it is gone."""
        deadline = time.monotonic() + wait
        while (left := deadline - time.monotonic()) > 0:
            try:
                return self._inbox.get(timeout=min(left, 1.0))
            except queue.Empty:
                # A worker forked by the parent may keep the pipe open after its death.
                if os.getppid() != self._parent:
                    return None
        return {}

    def _after_parent(self, mirror: Mirror) -> None:
        signal.alarm(_ORPHAN_SECONDS)
        time.sleep(1.0)  # its lock on the run directory falls a moment after it
        self._push(mirror.end_if_over)

    def _listen(self) -> None:
        for line in sys.stdin:
            self._inbox.put(json.loads(line))
        self._inbox.put(None)


def main() -> None:
    """The uploading process."""
    os.nice(_NICE_START)
    # Ctrl-C and a scheduler's signals are for the training, which then says how the run ended.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    out = os.dup(1)
    os.dup2(2, 1)

    def notify(message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            os.write(out, json.dumps(message).encode() + b"\n")

    try:
        _Child(notify).run()
    except Exception as error:
        notify({"warn": f"MLflow upload ends here: {type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
