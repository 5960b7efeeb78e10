"""`metrics.jsonl`: everything a run measured, one JSON object per line. It is the truth; MLflow is a mirror of it."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.errors import UserError
from pipeline.tracking.files import cut_torn_tail, iter_lines, json_line, write_aside

log = logging.getLogger("rookery")

METRICS_NAME = "metrics.jsonl"

Kind = Literal["train", "eval", "system", "event"]
KINDS: tuple[Kind, ...] = get_args(Kind)
POSITION = ("kind", "step", "samples", "epoch", "time")


class MetricsLog:
    """Appends to a run's `metrics.jsonl`; safe to call from several threads of the one process that writes the run.

    A line is handed to the operating system in one write, so a killed process loses at most the line it was writing,
    and that one is cut off when the file is opened again. There is no fsync: `log` costs tens of microseconds.
    Lines wait in memory while the disk is full.

    Args:
        run_dir: the run directory (a path, or a `RunDir`'s `path`).

    Raises:
        UserError: the file can't be opened, or is damaged before its last line.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / METRICS_NAME
        self._lock = threading.Lock()
        cut_torn_tail(self.path)
        self._fd = self._open()
        self._position: dict[str, Any] = {"step": 0, "samples": 0, "epoch": 0.0}
        self._waiting: deque[bytes] = deque()

    def log(
        self,
        kind: Kind,
        step: int | None = None,
        *,
        samples: int | None = None,
        epoch: float | None = None,
        **values: Any,
    ) -> None:
        """Write one line.

        Args:
            kind: what it is about; "event" is for what happened rather than what was measured.
            step: global step. `step`, `samples` and `epoch` left out are those of the newest line, so a sampling thread
                need not know them.
            samples: samples seen by all processes together.
            epoch: the same as a fraction of epochs.
            values: numbers, text, lists; 0-D tensors and arrays are read with `.item()`. NaN and infinities are kept.
        """
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is none of {KINDS}")
        reserved = values.keys() & set(POSITION)
        if reserved:
            raise ValueError(f"{sorted(reserved)} are the line's own fields")
        given = {"step": step, "samples": samples, "epoch": epoch}
        with self._lock:
            self._position |= {key: value for key, value in given.items() if value is not None}
            self._write(json_line({"kind": kind, **self._position, "time": time.time(), **values}))

    @property
    def step(self) -> int:
        """Of the newest line, once `rewind` or `log` was called; 0: there is none with a later one."""
        return int(self._position["step"])

    def rewind(self, step: int) -> int:
        """Forget what was measured after `step`, because the resumed run measures it again; events stay.

        The file is replaced in one rename, and an event records what was dropped.

        Returns:
            The number of lines dropped.
        """
        with self._lock:
            keep: list[bytes] = []
            dropped: list[dict[str, Any]] = []
            self._position = {"step": 0, "samples": 0, "epoch": 0.0}
            for raw, line in iter_lines(self.path):
                if line["kind"] != "event" and line["step"] > step:
                    dropped.append(line)
                    continue
                keep.append(raw)
                if line["step"] <= step:
                    self._position = {key: line[key] for key in self._position}
            if dropped:
                last = max(line["time"] for line in dropped)
                event = {"event": "rewind", "dropped": len(dropped), "last_time": last}
                keep.append(json_line({"kind": "event", **self._position, "time": time.time(), **event}))
                write_aside(self.path, lambda file: file.writelines(keep))
                os.close(self._fd)  # not before: what could not be written leaves the file as it was, and open
                self._fd = self._open()
        return len(dropped)

    def close(self) -> None:
        """Flush to disk and close; calling it again does nothing.

        Lines for which there is still no space are lost, with a warning.
        """
        with self._lock:
            if self._fd >= 0:
                fault = self._flush()
                if fault is not None:
                    log.warning("%s lacks its last %d lines: %s", self.path, len(self._waiting), fault)
                try:
                    os.fsync(self._fd)
                except OSError as error:
                    log.warning("%s may lack its last lines: %s", self.path, error.strerror)
                os.close(self._fd)
                self._fd = -1

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{self.path} can't be opened: {error.strerror}") from error

    def _write(self, line: bytes) -> None:
        """Write a line after those that found no space before it; what finds none now waits for the next."""
        first = not self._waiting
        self._waiting.append(line)
        fault = self._flush()
        if fault is not None and first:
            log.warning("%s can't be written: %s; its lines wait in memory until it can", self.path, fault)

    def _flush(self) -> str | None:
        """Write the lines that wait; returns why some still do, None if none does."""
        while self._waiting:
            line = self._waiting[0]
            try:
                written = os.write(self._fd, line)
            except OSError as error:
                return str(error.strerror)
            if written < len(line):
                # Half a line would swallow the next one.
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
                return os.strerror(errno.ENOSPC)
            self._waiting.popleft()
        return None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All lines of a `metrics.jsonl` (or of the run directory that holds it), NaN and infinities as floats again.

    A torn last line is left out, so the file of a running or killed run can be read. No file gives an empty list.

    Raises:
        UserError: a line before the last is damaged.
    """
    path = Path(path)
    path = path / METRICS_NAME if path.is_dir() else path
    return [line for _, line in iter_lines(path)] if path.exists() else []
