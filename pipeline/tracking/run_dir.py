"""A run directory: one writer at a time, and everything that is needed to understand or repeat the run.

    runs/<name>/
        config.yaml      resolved config
        facts.json       datasets, model size, git state, environment, command line
        git.diff         local changes against the commit, when there are any
        sessions.jsonl   a line when the run is started or started again, and one when it ends
        metrics.jsonl    see `pipeline.tracking.metrics`
        quarantine.jsonl bad samples that were replaced, when there are any; see `pipeline.train.quarantine`
        result.json      final figures, once the run is complete
        confusion.npz    confusion matrix of the newest evaluation; confusion_best.npz of the best one
        explain/         paths of GradCAT after every evaluation, when `explain.images` asks for them
        samples/         images of a generator after every evaluation, and interpolations between some
        checkpoints.json final and best weights by path and sha256
        mlflow.json      what was uploaded where

Only the process of rank 0 opens it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import sys
import time
import weakref
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.errors import UserError
from pipeline.tracking.environment import environment, git_state, key_versions
from pipeline.tracking.files import append_line, iter_lines, write_json, write_text
from pipeline.tracking.metrics import METRICS_NAME
from pipeline.tracking.redact import redact, redact_command

log = logging.getLogger("rookery")

CONFIG_NAME = "config.yaml"
FACTS_NAME = "facts.json"
DIFF_NAME = "git.diff"
SESSIONS_NAME = "sessions.jsonl"
QUARANTINE_NAME = "quarantine.jsonl"
RESULT_NAME = "result.json"
EXPLAIN_NAME = "explain"
SAMPLES_NAME = "samples"
CHECKPOINTS_NAME = "checkpoints.json"
LOCK_NAME = ".lock"

EndStatus = Literal["finished", "stopped", "failed", "interrupted"]


class RunDir:
    """An open run directory, locked for this process until `close` (or the process' end, however it ends).

    Use `RunDir.open`. As a context manager it closes as "finished", or as "failed" or "interrupted" on an exception.

    Attributes:
        path: the directory.
        facts: what `facts.json` holds.
    """

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self._lock_fd = lock_fd
        self._in_session = False
        _OPEN.add(self)

    @classmethod
    def open(
        cls, path: str | Path, resolved_config: dict[str, Any], facts: dict[str, Any] | None = None, wait: float = 3.0
    ) -> RunDir:
        """Create the directory or take over an existing one, and write down what the run is.

        Args:
            path: `runs/<name>`; parents are created.
            resolved_config: plain values; saved without credentials.
            facts: what the caller knows. Used here and by `rookery compare` where given: `datasets` (per split `path`,
                `fingerprint`, `manifest_sha256`, `samples`, `classes`), `model_params`, `total_steps`, `total_epochs`,
                `tags` (text, for MLflow). `git`, `environment` and `command` are added.
            wait: seconds to wait for the lock: a process killed a moment ago still holds it while it is torn down.

        Raises:
            UserError: another process is writing this run (nothing is touched then), or the folder can't be written.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock_fd = _lock(path, wait)
        except OSError as error:
            raise UserError(f"run directory {path} can't be written ({error.strerror}); choose another out=") from error
        run = cls(path, lock_fd)
        try:
            run._write_facts(resolved_config, facts or {})
        except BaseException:
            run._unlock()
            raise
        return run

    @staticmethod
    def saved_config(path: str | Path) -> dict[str, Any] | None:
        """The config an earlier start saved there, None if there was none. Credentials in it read `***`.

        Raises:
            UserError: the file is damaged.
        """
        file = Path(path) / CONFIG_NAME
        try:
            config = yaml.safe_load(file.read_text())
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise UserError(f"{path}: can't be written (a file is in its way); choose another out=") from error
        except (OSError, yaml.YAMLError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{file} can't be read ({reason}); restore it or choose another name=...") from error
        if not isinstance(config, dict):
            raise UserError(f"{file} holds no config; restore it or choose another name=...")
        return config

    def start_session(self, *, world_size: int, resumed_from: int | None = None, **more: Any) -> None:
        """Record that the run starts (or starts again at step `resumed_from`); call it once, before the first step."""
        entry = {
            "event": "start",
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "world_size": world_size,
            "resumed_from": resumed_from,
            "command": self.facts["command"],
            "versions": key_versions(),
            "git": self.facts["git"],
            **more,
        }
        append_line(self.path / SESSIONS_NAME, redact(entry))
        self._in_session = True

    def write_result(self, result: dict[str, Any]) -> None:
        """Write `result.json`: `top1`, `top5`, `loss`, `count`, `step`, `samples`, `best`, `params`, `wall_seconds`."""
        write_json(self.path / RESULT_NAME, result)

    def write_checkpoints(self, references: dict[str, Any]) -> None:
        """Write `checkpoints.json`: names ("final", "best") to `pipeline.tracking.files.file_reference(path)`."""
        write_json(self.path / CHECKPOINTS_NAME, references)

    def close(self, status: EndStatus = "finished") -> None:
        """Record how the session ended and let the next process in; calling it again does nothing.

        Args:
            status: "finished", "stopped" (as planned, before the end of the schedule), "failed" or "interrupted".
        """
        if self._lock_fd < 0:
            return
        try:
            self.end_session(status)
        finally:
            self._unlock()

    def end_session(self, status: EndStatus) -> None:
        """Record how it ended, before what may take time or be killed, such as uploads; `close` does it otherwise."""
        if self._in_session:
            self._in_session = False
            try:
                append_line(self.path / SESSIONS_NAME, {"event": "end", "time": time.time(), "status": status})
            except UserError as error:  # what ends the run, and its exit status, count for more
                log.warning("the end of this session is not recorded: %s", error)

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close("finished")
        else:
            self.close("interrupted" if issubclass(kind, KeyboardInterrupt) else "failed")

    def _write_facts(self, config: dict[str, Any], facts: dict[str, Any]) -> None:
        git, diff = git_state()
        own = {"git": git, "environment": environment(), "command": redact_command(sys.argv), "folder": str(Path.cwd())}
        self.facts = redact(facts) | own
        save_config(self.path, config)
        write_json(self.path / FACTS_NAME, self.facts)
        if diff:
            write_text(self.path / DIFF_NAME, redact(diff))
        else:
            (self.path / DIFF_NAME).unlink(missing_ok=True)

    def _unlock(self) -> None:
        _OPEN.discard(self)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def has_begun(path: Path) -> bool:
    """Whether a step of the run in this directory was ever recorded or saved."""
    if (path / RESULT_NAME).exists() or any(path.glob("checkpoints/step-*")):
        return True
    metrics = path / METRICS_NAME
    return metrics.exists() and any(entry.get("kind") in ("train", "eval") for _, entry in iter_lines(metrics))


def save_config(path: Path, config: dict[str, Any]) -> None:
    """Write a run's `config.yaml`, without credentials."""
    write_text(path / CONFIG_NAME, yaml.safe_dump(redact(config), sort_keys=False, width=120))


def is_locked(path: str | Path) -> bool:
    """Whether some process is writing this run directory now."""
    try:
        fd = os.open(Path(path) / LOCK_NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _lock(path: Path, wait: float) -> int:
    fd = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            holder = _holder(fd)
            os.close(fd)
            raise UserError(
                f"another run is writing {path} ({holder}); wait for it to end, or choose another name=..."
            ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    return fd


def _holder(fd: int) -> str:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
        return f"pid {holder['pid']} on host {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "unknown process"


_OPEN: weakref.WeakSet[RunDir] = weakref.WeakSet()


def _drop_locks_after_fork() -> None:
    # A forked loader worker shares the lock and may outlive a killed trainer by seconds; it would keep the restart out.
    for run in list(_OPEN):
        os.close(run._lock_fd)
        run._lock_fd = -1
    _OPEN.clear()


os.register_at_fork(after_in_child=_drop_locks_after_fork)
