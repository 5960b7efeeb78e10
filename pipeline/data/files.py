"""The files of a split as reading needs them: on this machine, in a store through the node's cache, or in a store."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from data_prep.attempts import Patience
from data_prep.manifest import DOWNLOADS, Shard
from data_prep.remote import RemoteStore
from data_prep.store import local_path, remote_store
from pipeline.data.cache import NodeCache, RemoteFile
from pipeline.data.cache_room import CacheOptions
from pipeline.errors import DamagedFile

# Some 80 seconds of waiting: a run is worth more of them than a command that somebody waits for.
_TRIES = 12


class ShardFile(Protocol):
    """An open shard."""

    def pread(self, size: int, offset: int) -> bytes:
        """`size` bytes from `offset` on, fewer at the end of the file.

        Raises:
            OSError: it can't be read any more.
            DamagedFile: the store has another file than the manifest describes.
            UserError: the store or the cache can't be used.
        """
        ...

    def close(self) -> None: ...


class Files(Protocol):
    """The files of one split.

    Attributes:
        name: how to call the directory in messages, without credentials.
    """

    name: str

    def at(self, file: str) -> str:
        """How to call a file in messages."""
        ...

    def size(self, shard: Shard) -> int:
        """Bytes that the shard has now, or those of the manifest where only fetching it would tell.

        Raises:
            OSError: there is no such file.
        """
        ...

    def index(self, shard: Shard) -> AbstractContextManager[Path]:
        """A file of this machine that holds the shard's index, as long as the context lasts.

        Raises:
            OSError, UserError: as `ShardFile.pread`.
        """
        ...

    def renew(self, shard: Shard) -> bool:
        """After a sample that can't be used: whether that was for a copy on this machine, which is fetched anew now."""
        ...

    def open(self, shard: Shard) -> ShardFile:
        """Open the shard.

        Raises:
            OSError: it can't be.
        """
        ...


def open_files(directory: str | Path, cache: CacheOptions | None) -> LocalFiles | CachedFiles | DirectFiles:
    """The files of a path or an address.

    Args:
        cache: of the node, for what lies in a store; None: every read is a request, right for a few of them.
    """
    store = remote_store(directory)
    if store is None:
        return LocalFiles(local_path(directory))
    if cache is None:
        return DirectFiles(store)
    store.patience = Patience.of_environment(tries=_TRIES)
    return CachedFiles(store, cache)


class LocalFiles:
    """Files of this machine, read where they are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = str(directory)

    def at(self, file: str) -> str:
        return str(self.directory / file)

    def size(self, shard: Shard) -> int:
        return (self.directory / shard.file).stat().st_size

    @contextmanager
    def index(self, shard: Shard) -> Iterator[Path]:
        yield self.directory / shard.index_file

    def renew(self, shard: Shard) -> bool:
        return False

    def open(self, shard: Shard) -> _LocalFile:
        return _LocalFile(open(self.directory / shard.file, "rb", buffering=0, opener=_without_waiting))


def _without_waiting(path: str, flags: int) -> int:
    """Open, as a shard should never be, a pipe too; reading from it then fails."""
    return os.open(path, flags | os.O_NONBLOCK)


class _LocalFile:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)

    def close(self) -> None:
        self._file.close()


class _StoredFiles:
    """What both ways of reading from a store share."""

    def __init__(self, store: RemoteStore) -> None:
        self.store = store
        self.name = store.name
        self._sizes: dict[str, int] | None = None

    def at(self, file: str) -> str:
        return self.store.at(file)

    def size(self, shard: Shard) -> int:
        if not self.store.lists:
            return shard.bytes
        if self._sizes is None:
            self._sizes = self.store.sizes()  # one request for all of them
        if shard.file not in self._sizes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.at(shard.file))
        return self._sizes[shard.file]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sizes": None}


class CachedFiles(_StoredFiles):
    """Files of a store, fetched whole into the cache of the node before they are read."""

    def __init__(self, store: RemoteStore, options: CacheOptions) -> None:
        super().__init__(store)
        self._options = options
        self._cache: NodeCache | None = None

    @property
    def cache(self) -> NodeCache:
        """This process's view of the cache."""
        if self._cache is None:
            self._cache = NodeCache(self._options)
        return self._cache

    @contextmanager
    def index(self, shard: Shard) -> Iterator[Path]:
        with self.descriptor(self._index_of(shard)) as descriptor:
            yield Path(f"/dev/fd/{descriptor}")

    def open(self, shard: Shard) -> _CachedFile:
        return _CachedFile(self, self._shard_of(shard))

    def renew(self, shard: Shard) -> bool:
        index, data = (self.cache.drop_if_rotten(file) for file in (self._index_of(shard), self._shard_of(shard)))
        return index or data

    def fetch(self, shard: Shard) -> bool:
        """Fetch the shard and its index if they are missing and no other process does; whether anything was fetched.

        One that is gone or damaged is left to those who read it, so that the next ones come all the same.
        """
        fetched = False
        for file in (self._index_of(shard), self._shard_of(shard)):
            if not self.cache.holds(file):
                try:
                    descriptor = self.cache.open(file, wait=False)
                except (FileNotFoundError, DamagedFile):
                    return False
                if descriptor is not None:
                    os.close(descriptor)
                    fetched = True
        return fetched

    @contextmanager
    def descriptor(self, file: RemoteFile) -> Iterator[int]:
        """An open file of the cache, for a moment: see `pipeline.data.cache`."""
        descriptor = self.cache.open(file)
        assert descriptor is not None, "it was waited for"
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _index_of(self, shard: Shard) -> RemoteFile:
        return RemoteFile(self.store, shard.index_file, shard.index_sha256, None)

    def _shard_of(self, shard: Shard) -> RemoteFile:
        return RemoteFile(self.store, shard.file, shard.sha256, shard.bytes)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_cache": None}


class _CachedFile:
    """Opened anew for every read, so that the cache can take the file away, and the disk's room with it."""

    def __init__(self, files: CachedFiles, file: RemoteFile) -> None:
        self._files, self._file = files, file

    def pread(self, size: int, offset: int) -> bytes:
        with self._files.descriptor(self._file) as descriptor:
            return os.pread(descriptor, size, offset)

    def close(self) -> None:
        """Nothing is open."""


class DirectFiles(_StoredFiles):
    """Files of a store without a cache: each read is a request of its own."""

    @contextmanager
    def index(self, shard: Shard) -> Iterator[Path]:
        for _ in range(DOWNLOADS):
            data = self.store.read(shard.index_file)
            if hashlib.sha256(data).hexdigest() == shard.index_sha256:
                break
        else:
            mend = f"`rookery verify {self.name}` checks all files"
            raise DamagedFile(self.at(shard.index_file), "not the index that the manifest describes", mend)
        with os.fdopen(os.memfd_create("index"), "w+b") as file:
            file.write(data)
            file.flush()
            yield Path(f"/dev/fd/{file.fileno()}")

    def renew(self, shard: Shard) -> bool:
        return False

    def open(self, shard: Shard) -> _DirectFile:
        return _DirectFile(self.store, shard.file)


class _DirectFile:
    def __init__(self, store: RemoteStore, file: str) -> None:
        self._store, self._file = store, file

    def pread(self, size: int, offset: int) -> bytes:
        return self._store.read_range(self._file, offset, size)

    def close(self) -> None:
        """Nothing is open."""
