"""What is finished in `OUT/<split>`: its `.prep` folder, which makes a preparation restartable.

::

    .prep/lock                   held while a preparation runs
    .prep/plan.json              what the shards are made from; another plan is refused
    .prep/train-000000.tar.json  written after the shard: a shard without its record is made again
    .prep/tmp/                   shards being written

Of a directory on a server the lock and the shards being written lie on the machine that makes them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.manifest import INDEX_SUFFIX, MANIFEST_NAME, BadImage, Shard
from data_prep.plan import Plan
from data_prep.remote import RemoteStore
from data_prep.store import LocalStore, open_store
from data_prep.wording import counted

STATE_FOLDER = ".prep"
SHARD_SUFFIXES = (".tar", ".beton", INDEX_SUFFIX)
PLAN = f"{STATE_FOLDER}/plan.json"
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

    def __init__(self, directory: str | Path | LocalStore | RemoteStore) -> None:
        self.store = open_store(directory) if isinstance(directory, str | Path) else directory
        self.name = self.store.name
        # What is being made lies on this machine in any case.
        self.work = self.store.path / STATE_FOLDER if isinstance(self.store, LocalStore) else _work_folder(self.name)
        self.scratch = self.work / "tmp"

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Keep other preparations out of the directory; yields whether the file system could promise that.

        Those that other machines make on the same server are not kept out.
        """
        with self.writing():
            self.work.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield self._lock(descriptor)
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{self.name}: another `rookery prep` is writing here; wait for it, or choose another OUT"
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
        old = self._read_json(PLAN)
        if old is None or old.get("fingerprint") != plan.fingerprint:
            if not overwrite:
                self._refuse_others(old, plan.description)
            self.store.remove(MANIFEST_NAME)
            content = {"fingerprint": plan.fingerprint, **plan.description}
            self.store.write(PLAN, json.dumps(content, indent=1, sort_keys=True).encode())
        self.empty_scratch()
        sizes, recorded = self.store.sizes(), self.store.sizes(STATE_FOLDER)
        candidates = [file for file in files if f"{file}.json" in recorded]
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            records = threads.map(lambda file: self._record(file, plan.fingerprint, sizes, check_hashes), candidates)
            finished = {record.shard.file: record for record in records if record is not None}
        self._clean(set(finished), plan.description["split"], sizes, recorded)
        return finished

    def check_still_ours(self, plan: Plan) -> None:
        """Look once more before the manifest is written, since on a server another preparation is not kept out.

        Raises:
            UserError: another one has taken the directory over.
        """
        if (self._read_json(PLAN) or {}).get("fingerprint") != plan.fingerprint:
            raise UserError(
                f"{self.name}: another `rookery prep` with other options or another source has written here "
                "meanwhile; choose another OUT for one of them"
            )

    def _refuse_others(self, old: dict[str, Any] | None, new: dict[str, Any]) -> None:
        advice = "choose another OUT, or replace them with --overwrite"
        if old is not None:
            changes = "; ".join(_differences(old, new)) or "the release of rookery"
            raise UserError(f"{self.name}: the shards here were made otherwise ({changes}); {advice}")
        found = sorted(name for name in self.store.sizes() if name == MANIFEST_NAME or name.endswith(SHARD_SUFFIXES))
        if found:
            others = f" and {counted(len(found) - 1, 'other file')}" if len(found) > 1 else ""
            raise UserError(f"{self.name}: holds {found[0]}{others} that no preparation recorded here; {advice}")

    def _clean(self, finished: set[str], split: str, names: Iterable[str], recorded: Iterable[str]) -> None:
        """Remove shards without a valid record, and records without their shard."""
        ours = re.compile(rf"{re.escape(split)}-\d{{6,}}({'|'.join(map(re.escape, SHARD_SUFFIXES))})")
        keep = finished | {Path(file).stem + INDEX_SUFFIX for file in finished}
        for name in names:
            if ours.fullmatch(name) and name not in keep:
                self.store.remove(name)
        for name in recorded:
            if name.startswith(f"{split}-") and name.endswith(".json") and Path(name).stem not in finished:
                self.store.remove(f"{STATE_FOLDER}/{name}")

    def _record(self, file: str, fingerprint: str, sizes: Mapping[str, int], check_hashes: bool) -> Record | None:
        """The record of a shard, None unless the shard is there as recorded: by size, or by hash if asked."""
        content = self._read_json(f"{STATE_FOLDER}/{file}.json")
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
        index, store = shard.index_file, self.store
        if sizes.get(file) != shard.bytes or sizes.get(index) != record.index_bytes:
            return None
        if check_hashes and (store.sha256(file) != shard.sha256 or store.sha256(index) != shard.index_sha256):
            return None
        return record

    def empty_scratch(self) -> None:
        """Remove shards that were being written when their worker ended."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()

    def publish(self, record: Record, tar: Path, index: Path) -> None:
        """Move a written shard to its place, then write its record: the order a kill at any moment asks for."""
        if record.shard.samples:
            self.store.publish(index, record.shard.index_file)
            self.store.publish(tar, record.shard.file)
            self.store.settle()
        content = json.dumps(asdict(record), sort_keys=True).encode()
        self.store.write(f"{STATE_FOLDER}/{record.shard.file}.json", content)

    def writing(self) -> AbstractContextManager[None]:
        """`writing`, of where the shards are made."""
        return writing(self.store.path if isinstance(self.store, LocalStore) else self.work)

    def _read_json(self, file: str) -> dict[str, Any] | None:
        try:
            content = json.loads(self.store.read(file))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None


def _work_folder(name: str) -> Path:
    """Where this machine makes the shards of a remote directory: the same place at the next start, which cleans up."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"rookery-prep-{os.getuid()}-{digest}")


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
