"""The node's cache of files from a store, which all processes of a node share, and all runs of a user.

::

    CACHE/
        <sha256>          a whole file whose hash was verified, under that hash; its mtime says when it was used last
        <sha256>.part     one that is on its way, locked (flock) by the process that fetches it
        <sha256>.fault    why one couldn't be had: the store has lost or damaged it
        .lock             held for moments, while room is made or a file gets its name

A file gets its name when its bytes were hashed and flushed to the disk, so that what a kill leaves behind is a `.part`,
which nobody trusts: the next process that wants the file, or the room, starts it anew. The room of a file is taken
before it is fetched, by giving the `.part` its full size, so that the sum of all sizes stays below the limit at all
times. Where there is none, the files that were used the longest ago go.

A process may lose a file at any moment to another one that needs the room. `open` therefore hands out a descriptor,
which nobody can take away, and callers close it as soon as they have read: an open file occupies the disk even when its
name is gone. While a process waits for room it holds none, so that processes never wait for each other in a circle.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_prep.hashes import file_sha256
from data_prep.manifest import DOWNLOADS
from data_prep.remote import RemoteStore, write_all
from pipeline.data.cache_faults import Faults
from pipeline.data.cache_room import CacheOptions, entries, free_limit
from pipeline.errors import DamagedFile, UserError

log = logging.getLogger("rookery")

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_POLL_SECONDS = 0.05
# Waiting for a file for longer is worth a line, but only one of all processes of the node within so many seconds.
_TOLD_SECONDS = 2.0
_LINE_SECONDS = 10.0
# How exactly the time of the last use is kept.
_TOUCH_SECONDS = 1.0
# So long a file counts as sound whose hash was right.
_SOUND_SECONDS = 300.0


@dataclass(frozen=True)
class RemoteFile:
    """A file of a store, as a manifest describes it; `size` is None where the manifest doesn't say."""

    store: RemoteStore
    file: str
    sha256: str
    size: int | None

    @property
    def name(self) -> str:
        return self.store.at(self.file)


class NodeCache:
    """One process's view of the cache; made anew in every process.

    Raises:
        UserError: the folder can't be made or written, or belongs to somebody else.
    """

    def __init__(self, options: CacheOptions) -> None:
        self.folder = options.path
        self._limit = None if options.gigabytes is None else int(options.gigabytes * 1e9)
        self._touched: dict[str, float] = {}
        self._sound: dict[str, float] = {}
        self._faults = Faults(self.folder)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if options.directory is None and self.folder.stat().st_uid != os.getuid():
                raise UserError(f"{self.folder}: belongs to another user; set data.cache to a folder of your own")
            with self._locked():
                self._make_room(0)
        except OSError as error:
            raise self._unwritable(error) from error

    def limit(self) -> int:
        """Bytes that the cache may hold; without a limit of its own, as the disk is filled now."""
        return self._limit if self._limit is not None else free_limit(self.folder, self._held())

    def holds(self, file: RemoteFile) -> bool:
        """Whether the file is here, or was a moment ago; it then counts as used now."""
        return self._touch(file.sha256)

    def open(self, file: RemoteFile, wait: bool = True) -> int | None:
        """A descriptor of the whole file, fetched if it isn't here; the caller closes it.

        Args:
            wait: for other processes, which fetch the file or leave it no room; else the answer is None then.

        Raises:
            FileNotFoundError: the store doesn't have it, or hadn't a few minutes ago.
            DamagedFile: what the store has is not what the manifest describes, or was not a few minutes ago.
            UserError: the store can't be read, or the cache can't take the file.
        """
        began = time.monotonic()
        while True:
            descriptor = self._open_verified(file)
            if descriptor is None:
                noted = self._faults.noted(file.sha256, file.name)
                if noted is not None:
                    raise noted
                descriptor = self._fetch_alone(file, wait)
            if descriptor is not None or not wait:
                self._tell(file, time.monotonic() - began, wait)
                return descriptor
            time.sleep(_POLL_SECONDS)

    def drop_if_rotten(self, file: RemoteFile) -> bool:
        """Remove a file that is no longer what was fetched, which its size alone doesn't tell; whether it was removed.

        Of a file whose sample can't be used; its bytes are hashed once in a while.
        """
        path = self.folder / file.sha256
        if time.monotonic() - self._sound.get(file.sha256, -math.inf) < _SOUND_SECONDS:
            return False
        try:
            with open(path, "rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256:
                    self._sound[file.sha256] = time.monotonic()
                    return False
                with self._locked():
                    if not _is_at(opened.fileno(), path):  # somebody else has fetched it again
                        return True
                    path.unlink()
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno != errno.EIO:  # nothing is known then
                return False
            try:
                path.unlink(missing_ok=True)
            except OSError:
                return False
        log.warning("%s: its copy in %s has changed since it was fetched, fetching it again", file.name, self.folder)
        return True

    def _open_verified(self, file: RemoteFile) -> int | None:
        path = self.folder / file.sha256
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unwritable(error) from error
        if file.size not in (None, os.fstat(descriptor).st_size):  # somebody cut it
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        self._touch(file.sha256)
        return descriptor

    def _fetch_alone(self, file: RemoteFile, wait: bool) -> int | None:
        """Fetch the file, unless another process does so already: then None."""
        part = self.folder / f"{file.sha256}.part"
        try:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._unwritable(error) from error
        kept = False
        try:
            if not self._lock(descriptor) or not _is_at(descriptor, part) or (self.folder / file.sha256).exists():
                return None
            noted = self._faults.noted(file.sha256, file.name)  # by who held the lock before
            if noted is not None:
                part.unlink(missing_ok=True)
                raise noted
            try:
                kept = self._fetch(file, descriptor, part, wait)
            except DamagedFile as error:
                self._faults.note(file.sha256, [error.reason, error.mend])
                raise
            except OSError as error:
                if isinstance(error, FileNotFoundError) and error.filename != str(part):
                    self._faults.note(file.sha256, [])
                    raise
                raise self._unwritable(error) from error
            finally:
                if not kept:
                    part.unlink(missing_ok=True)
            if not kept:
                return None
            self._sound.pop(file.sha256, None)
            self._faults.forget(file.sha256)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            return descriptor
        finally:
            if not kept:
                os.close(descriptor)

    def _fetch(self, file: RemoteFile, descriptor: int, part: Path, wait: bool) -> bool:
        """Fill the locked part, verify it and give it its name; False if there is no room now."""
        for _ in range(DOWNLOADS):
            data = None if file.size is not None else file.store.read(file.file)
            size = len(data) if data is not None else file.size
            assert size is not None
            if not self._reserve(descriptor, size, wait):
                return False
            if data is None:
                file.store.fetch(file.file, size, descriptor)
            else:
                write_all(descriptor, data, 0)
            if file_sha256(part) == file.sha256:
                os.fsync(descriptor)
                with self._locked():  # who counts what is held would see a file that changes its name twice, or never
                    os.replace(part, self.folder / file.sha256)
                return True
            log.warning("%s: arrived damaged (its sha256 is not that of the manifest), fetching it again", file.name)
        raise DamagedFile(
            file.name,
            f"not what the manifest describes, {DOWNLOADS} times in a row (another sha256)",
            f"`rookery verify {file.store.name}` checks all files, `rookery prep --repair` makes the damaged ones anew",
        )

    def _reserve(self, descriptor: int, size: int, wait: bool) -> bool:
        """Give the part its full size as soon as there is room for it."""
        while True:
            with self._locked():
                os.ftruncate(descriptor, 0)
                if self._make_room(size):
                    os.ftruncate(descriptor, size)
                    return True
            if not wait:
                return False
            time.sleep(_POLL_SECONDS)

    def _make_room(self, size: int) -> bool:
        """Remove what was used the longest ago until there is room for `size` more bytes; with the lock held."""
        found = sorted(entries(self.folder), key=lambda entry: entry.used)
        held = sum(entry.size for entry in found)
        limit = self._limit if self._limit is not None else free_limit(self.folder, held)
        if size > limit:
            mend = "raise data.cache_gb" if self._limit is not None else "free space there, or set data.cache elsewhere"
            raise UserError(
                f"a file of {size / 1e9:.3g} GB has no place in the {limit / 1e9:.3g} GB that the cache {self.folder} "
                f"may take; {mend}"
            )
        if held + size > limit:  # what a kill left behind goes first
            held -= sum(entry.size for entry in found if entry.is_part and self._removed_abandoned(entry.path))
        going, excess = [], held + size - limit
        for entry in found:
            if excess <= 0:
                break
            if not entry.is_part:
                going.append(entry)
                excess -= entry.size
        if excess > 0:  # others are fetching: nothing goes for room that is not enough
            return False
        for entry in going:
            entry.path.unlink(missing_ok=True)
        return True

    def _removed_abandoned(self, part: Path) -> bool:
        """Remove a part unless somebody fetches it; whether it was removed."""
        try:
            descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if not self._lock(descriptor) or not _is_at(descriptor, part):
                return False
            part.unlink()  # under its lock: somebody who opened it before sees that its name is gone
            return True
        finally:
            os.close(descriptor)

    def _held(self) -> int:
        return sum(entry.size for entry in entries(self.folder))

    def _touch(self, name: str) -> bool:
        """Whether the file is here, or was a moment ago; it then counts as used now."""
        now = time.monotonic()
        if now - self._touched.get(name, -_TOUCH_SECONDS) < _TOUCH_SECONDS:
            return True
        try:
            os.utime(self.folder / name)
        except FileNotFoundError:
            return False
        self._touched[name] = now
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._lock(descriptor, wait=True)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int, wait: bool = False) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise UserError(
                    f"{self.folder}: a file system without locks, which the processes of a node need; "
                    "set data.cache to a folder on a disk of the node"
                ) from error
            raise
        return True

    def _unwritable(self, error: OSError) -> UserError:
        if error.errno in _NO_SPACE:
            return UserError(
                f"{self.folder}: no space left on this disk; the cache holds {self._held() / 1e9:.3g} GB of the "
                f"{self.limit() / 1e9:.3g} GB it may take; free space, lower data.cache_gb, or set data.cache to "
                "another folder"
            )
        return UserError(f"{self.folder}: can't be used as cache ({error.strerror or error}); set data.cache")

    def _tell(self, file: RemoteFile, seconds: float, waited: bool) -> None:
        """Say that a step had to wait for this file, unless that was said a moment ago."""
        if not waited or seconds < _TOLD_SECONDS or file.size is None:
            return
        told = self.folder / ".told"
        with suppress(OSError):
            if told.exists() and time.time() - told.stat().st_mtime < _LINE_SECONDS:
                return
            told.touch()
        log.warning(
            "waited %.1f s for %s (%.1f MB, %.1f MB/s)", seconds, file.name, file.size / 1e6, file.size / 1e6 / seconds
        )


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
