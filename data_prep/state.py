"""What is finished in `OUT/<split>`: its `.prep` folder, which makes a preparation restartable.

::

    .prep/lock                   held while a preparation runs
    .prep/plan.json              what the shards are made from; another plan is refused
    .prep/train-000000.tar.json  written after the shard: a shard without its record is made again
    .prep/tmp/                   shards being written
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.atomic import sync_directory, write_atomic
from data_prep.errors import UserError
from data_prep.manifest import INDEX_SUFFIX, MANIFEST_NAME, BadImage, Shard
from data_prep.plan import Plan
from data_prep.wording import counted

STATE_FOLDER = ".prep"
SHARD_SUFFIXES = (".tar", ".beton", INDEX_SUFFIX)
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
HASH_THREADS = 8


@dataclass(frozen=True)
class Record:
    """One finished shard (`shard.samples` may be 0: then it has no files) and what was wrong in its images."""

    plan: str
    shard: Shard
    index_bytes: int
    quarantine: list[BadImage]


class SplitState:
    """The state of one split directory; every method but `locked` wants the lock held."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.folder = directory / STATE_FOLDER
        self.scratch = self.folder / "tmp"

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Keep other preparations out of the directory; yields whether the file system could promise that."""
        with writing(self.directory):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield self._lock(descriptor)
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{self.directory}: another `rookery prep` is writing here; wait for it, or choose another OUT"
            ) from error
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            raise
        return True

    def begin(self, plan: Plan, files: list[str], overwrite: bool, check_hashes: bool) -> dict[str, Record]:
        """Take up the plan and return the records of its finished shards; what was left half done is removed.

        Raises:
            UserError: the directory holds shards of another plan, or of no plan at all, and `overwrite` is off.
        """
        plan_path = self.folder / "plan.json"
        old = _read_json(plan_path)
        if old is None or old.get("fingerprint") != plan.fingerprint:
            if not overwrite:
                self._refuse_others(old, plan.description)
            (self.directory / MANIFEST_NAME).unlink(missing_ok=True)
            content = {"fingerprint": plan.fingerprint, **plan.description}
            write_atomic(plan_path, json.dumps(content, indent=1, sort_keys=True).encode())
        self.empty_scratch()
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            records = threads.map(lambda file: self._record(file, plan.fingerprint, check_hashes), files)
            finished = {record.shard.file: record for record in records if record is not None}
        self._clean(set(finished), plan.description["split"])
        return finished

    def _refuse_others(self, old: dict[str, Any] | None, new: dict[str, Any]) -> None:
        advice = "choose another OUT, or replace them with --overwrite"
        if old is not None:
            changes = "; ".join(_differences(old, new)) or "the release of rookery"
            raise UserError(f"{self.directory}: the shards here were made otherwise ({changes}); {advice}")
        found = sorted(
            path.name
            for path in self.directory.iterdir()
            if path.name == MANIFEST_NAME or path.name.endswith(SHARD_SUFFIXES)
        )
        if found:
            others = f" and {counted(len(found) - 1, 'other file')}" if len(found) > 1 else ""
            raise UserError(f"{self.directory}: holds {found[0]}{others} that no preparation recorded here; {advice}")

    def _clean(self, finished: set[str], split: str) -> None:
        """Remove shards without a valid record, and records without their shard."""
        ours = re.compile(rf"{re.escape(split)}-\d{{6,}}({'|'.join(map(re.escape, SHARD_SUFFIXES))})")
        keep = finished | {Path(file).stem + INDEX_SUFFIX for file in finished}
        for path in self.directory.iterdir():
            if ours.fullmatch(path.name) and path.name not in keep:
                path.unlink()
        for path in self.folder.glob(f"{split}-*.json"):
            if path.stem not in finished:
                path.unlink()

    def _record(self, file: str, fingerprint: str, check_hashes: bool) -> Record | None:
        """The record of a shard, None unless the shard is there as recorded: by size, or by hash if asked."""
        content = _read_json(self.folder / f"{file}.json")
        if content is None or content.get("plan") != fingerprint:
            return None
        try:
            shard = Shard(**content["shard"])
            quarantine = [BadImage(**bad) for bad in content["quarantine"]]
            record = Record(fingerprint, shard, content["index_bytes"], quarantine)
        except (KeyError, TypeError):
            return None
        if not shard.samples:
            return record
        tar, index = self.directory / file, self.directory / shard.index_file
        if _size(tar) != shard.bytes or _size(index) != record.index_bytes:
            return None
        if check_hashes and (file_sha256(tar) != shard.sha256 or file_sha256(index) != shard.index_sha256):
            return None
        return record

    def empty_scratch(self) -> None:
        """Remove shards that were being written when their worker ended."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()

    def publish(self, record: Record, tar: Path, index: Path) -> None:
        """Move a written shard to its place, then write its record: the order a kill at any moment asks for."""
        if record.shard.samples:
            os.replace(index, self.directory / record.shard.index_file)
            os.replace(tar, self.directory / record.shard.file)
            sync_directory(self.directory)
        write_atomic(self.folder / f"{record.shard.file}.json", json.dumps(asdict(record), sort_keys=True).encode())


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn a failure of the operating system to write the shards into a message for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise UserError(
                f"{directory}: no space left on this file system; free some and run the same command again: "
                "the finished shards are kept"
            ) from error
        raise UserError(f"cannot write {error.filename or directory}: {error.strerror or error}") from error


def file_sha256(path: Path) -> str:
    """Hash of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for key in sorted({*old.get("options", {}), *new["options"]}):
        before, after = old.get("options", {}).get(key), new["options"].get(key)
        if before != after:
            yield f"{key} was {before}, is {after}"
    for key in ("format", "split"):
        if old.get(key) != new[key]:
            yield f"{key} was {old.get(key)}, is {new[key]}"
    if old.get("source") != new["source"]:
        before = old.get("source") or {}
        same_place = (before.get("kind"), before.get("name")) == (new["source"]["kind"], new["source"]["name"])
        yield "the source has changed since" if same_place else f"from {before.get('kind')} {before.get('name')}"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
