"""Checkpoints on disk: written aside, flushed, committed, then renamed; never trusted without their commit.

::

    <run>/checkpoints/step-00000600/
        commit.json     step, size and SHA-256 of every other file, and a SHA-256 of all that; written last
        progress.json   what the loop needs: step, samples, best result
        ...             what the engine wrote

A directory without `commit.json`, or with a file that does not match it, is passed over with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.tracking.files import file_sha256
from pipeline.train.distributed import World

log = logging.getLogger("rookery")

COMMIT = "commit.json"
PROGRESS = "progress.json"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint."""

    step: int
    path: Path

    def progress(self) -> dict[str, Any]:
        return json.loads((self.path / PROGRESS).read_text())


class CheckpointStore:
    """The checkpoints of one run directory.

    Args:
        directory: `<run>/checkpoints`.
        keep_last: complete checkpoints that stay.
    """

    def __init__(self, directory: Path, keep_last: int = 2) -> None:
        self.directory = directory
        self.keep_last = keep_last

    def save(self, step: int, progress: dict[str, Any], write: Callable[[Path], None], world: World) -> Path | None:
        """Write and commit a checkpoint; collective.

        A store that can't be written, or is full, costs a warning and this checkpoint: the earlier ones stay.

        Args:
            step: global steps done.
            progress: JSON state of the loop.
            write: called on every process with the directory to write the engine's files into.

        Returns:
            The checkpoint's directory, None if it could not be written.
        """
        final = self.directory / f"step-{step:08d}"
        part = self.directory / f".part-{step:08d}"

        def prepare() -> None:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

        def commit() -> None:
            (part / PROGRESS).write_text(json.dumps(progress, indent=1))
            _commit(part, step)
            if final.exists():  # a damaged one of the same step
                shutil.rmtree(final)
            part.rename(final)
            _fsync(self.directory)
            self._retire()

        for stage, alone in ((prepare, True), (lambda: write(part), False), (commit, True)):
            fault = _attempt(stage) if world.is_main or not alone else None
            if world.any(fault is not None):
                if fault is not None:
                    free = shutil.disk_usage(self.directory.parent).free / 1e6
                    log.warning(
                        "checkpoint of step %d is not saved: %s (%.0f MB free in %s); training goes on",
                        *(step, fault, free, self.directory.parent),
                    )
                if world.is_main:
                    shutil.rmtree(part, ignore_errors=True)
                return None
        return final

    def newest(self, until: int | None = None) -> Checkpoint | None:
        """The newest checkpoint, of step `until` at most, whose files are all there and unchanged."""
        for path in sorted(self.directory.glob("step-*"), reverse=True):
            step = int(path.name.removeprefix("step-"))
            if until is not None and step > until:
                continue
            fault = _fault(path)
            if fault is None:
                return Checkpoint(step, path)
            log.warning("checkpoint %s is not used: %s", path, fault)
        return None

    def damage(self) -> str | None:
        """What is wrong where there are checkpoints, and `newest` found none that is whole."""
        paths = sorted(self.directory.glob("step-*"))
        if not paths:
            return None
        return f"none of its checkpoints is whole (the newest, {paths[-1]}: {_fault(paths[-1])})"

    def clear_parts(self) -> None:
        """Remove what a killed save left behind."""
        for part in self.directory.glob(".part-*"):
            shutil.rmtree(part, ignore_errors=True)

    def _retire(self) -> None:
        for path in sorted(self.directory.glob("step-*"))[: -self.keep_last]:
            # Without its commit a half-removed checkpoint is never mistaken for a whole one.
            (path / COMMIT).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def install(source: Checkpoint, directory: Path, progress: dict[str, Any]) -> Path:
    """Make another run's checkpoint the newest one of a run, with progress of its own; nobody else may write there.

    Args:
        source: the other run's.
        directory: `<run>/checkpoints`. Checkpoints of the same step and later ones are removed.
        progress: what the loop is to go on with.
    """
    final = directory / source.path.name
    part = directory / f".part-{source.step:08d}"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source.path, part)
    (part / COMMIT).unlink()
    (part / PROGRESS).write_text(json.dumps(progress, indent=1))
    _commit(part, source.step)
    for path in directory.glob("step-*"):
        if path.name >= final.name:
            (path / COMMIT).unlink(missing_ok=True)
            shutil.rmtree(path)
    part.rename(final)
    _fsync(directory)
    return final


def _attempt(stage: Callable[[], None]) -> str | None:
    """Why a stage of a save failed, None if it did not. torch reports a full disk as a RuntimeError."""
    try:
        stage()
    except (OSError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def _commit(directory: Path, step: int) -> None:
    files = {}
    for path in sorted(directory.iterdir()):
        _fsync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    commit = directory / COMMIT
    content = {"step": step, "files": files}
    commit.write_text(json.dumps({"content": content, "sha256": _digest(content)}, indent=1))
    _fsync(commit)
    _fsync(directory)


def _fault(directory: Path) -> str | None:
    """What is wrong with a checkpoint directory, or None."""
    try:
        commit = json.loads((directory / COMMIT).read_text())
        if _digest(commit["content"]) != commit["sha256"]:
            return f"{COMMIT} has changed since it was written (SHA-256 differs)"
        for name, expected in commit["content"]["files"].items():
            path = directory / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {expected['bytes']} were written"
            if file_sha256(path) != expected["sha256"]:
                return f"{name} has changed since it was written (SHA-256 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{COMMIT} can't be read: {error}"
    return None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
