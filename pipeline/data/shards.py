"""Random access to the samples of a split, wherever its shards lie, through their indexes."""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_prep import beton
from data_prep.hashes import file_sha256
from data_prep.manifest import MAX_BYTES, BadIndex, Manifest, load_index, token_labels_offset
from pipeline.data.cache_room import CacheOptions
from pipeline.data.files import ShardFile, open_files
from pipeline.data.substitute import BadSample
from pipeline.errors import DamagedFile, UserError

T = TypeVar("T")

# An open shard holds two file descriptors, of which a process often has no more than 1,024.
MAX_OPEN = 256
# What fails for want of memory or descriptors says nothing about the data.
_OWN_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_MEND = "restore it, or rebuild it with `rookery prep --repair`"


@dataclass(frozen=True)
class Sample:
    """One stored sample.

    Attributes:
        key: its name.
        data: the bytes of the image file; of RGB pixels, row by row, where there is a `shape`.
        label: position of its class in the manifest.
        tokens: the bytes of its label map if asked for.
        shape: (height, width) of an image that is stored as pixels, None for one that is stored as a file.
    """

    key: str
    data: bytes
    label: int
    tokens: bytes | None = None
    shape: tuple[int, int] | None = None


@dataclass
class _OpenShard:
    rows: np.ndarray
    file: ShardFile | None = None  # opened when a sample is read: keys stand in the index


class ShardSet:
    """All samples of one split, numbered through its shards in the manifest's order.

    Reads are positioned (`pread`), so one open file per shard serves any access pattern. The `MAX_OPEN` shards that
    were used last stay open.

    Args:
        directory: path or address of the split.
        cache: the node's cache for what has an address; None: every sample is a request, right for a few of them.
        check_files: look at once whether all shards are there, and of the right size.

    Raises:
        UserError: no manifest, or a shard that is missing or of another size.
    """

    def __init__(self, directory: str | Path, cache: CacheOptions | None = None, check_files: bool = True) -> None:
        self.files = open_files(directory, cache)
        self.directory = self.files.name
        self.manifest = Manifest.load(directory)
        if check_files and (wrong := next(self.missing(), None)) is not None:
            raise UserError(f"{wrong}; {_MEND}; `rookery verify` lists all damage")
        self._starts = [0, *accumulate(shard.samples for shard in self.manifest.shards)]
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, samples: Iterable[int], tokens: bool = False) -> Iterator[Sample]:
        """The given samples, in the given order; with `tokens` their label maps too, which the split must have.

        Raises:
            BadSample: a shard can't be read or ends before the sample does, its index was changed, or the sample's row
                of it can't be true.
        """
        for sample in samples:
            shard, row = self._find(sample)
            key, offset, size, label = _key(row), int(row["offset"]), int(row["size"]), int(row["label"])
            described = self.manifest.shards[shard]
            if offset + size > described.bytes or size > MAX_BYTES:
                where = f"bytes {offset} to {offset + size} of {described.bytes}"
                raise BadSample(self._path(shard), f"it can't be where its index says, at {where}", _MEND, key)
            if not 0 <= label < self.manifest.num_classes:
                reason = f"its label is {label}, but there are {self.manifest.num_classes} classes"
                raise BadSample(self._path(shard), reason, _MEND, key)
            data = self._pread(shard, size, offset, key)
            shape = self._shape(shard, sample, offset, key)
            yield Sample(key, data, label, self._map(shard, offset, size, key) if tokens else None, shape)

    def keys(self, samples: Iterable[int]) -> list[str]:
        """Keys of the given samples, without reading them; shard and row where an index was lost meanwhile."""
        return [self._key_of(sample) for sample in samples]

    def reopen(self, sample: int) -> None:
        """Open the shard of a sample anew when it is read next: it may be mended by then, which makes another file."""
        self._forget(self._place(sample)[0])

    def tried_twice(self, sample: int, load: Callable[[], T]) -> T:
        """`load()`, which reads the sample; once more where a copy on this machine was what was bad, and is no longer.

        Raises:
            BadSample: it raised it.
        """
        try:
            return load()
        except BadSample as error:
            if error.passing:
                raise
            shard = self._place(sample)[0]
            self._forget(shard)
            if not self.files.renew(self.manifest.shards[shard]):
                raise
        return load()

    def path_of(self, sample: int) -> str:
        """The shard that holds a sample, as messages call it."""
        return self._path(self._place(sample)[0])

    def missing(self) -> Iterator[str]:
        """What is wrong with shards that are not there, or of another size than the manifest says: one stat for each.

        A lost or cut file is thus reported before the first step rather than in hour nine.
        """
        for number, shard in enumerate(self.manifest.shards):
            path = self._path(number)
            try:
                size = self.files.size(shard)
            except OSError as error:
                yield f"{path}: shard missing ({error.strerror})"
                continue
            if size != shard.bytes:
                yield f"{path}: {size} bytes, the manifest says {shard.bytes}"

    def close(self) -> None:
        """Close all files; reading opens them again."""
        while self._open:
            self._forget(next(iter(self._open)))

    def __getstate__(self) -> dict[str, Any]:
        # A loader process opens the files itself.
        return self.__dict__ | {"_open": OrderedDict()}

    def _path(self, shard: int) -> str:
        return self.files.at(self.manifest.shards[shard].file)

    def _place(self, sample: int) -> tuple[int, int]:
        """Shard, and row in it, of a sample."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        shard = bisect_right(self._starts, sample) - 1
        return shard, int(sample) - self._starts[shard]

    def _find(self, sample: int) -> tuple[int, Any]:
        """Shard and index row of a sample."""
        shard, row = self._place(sample)
        return shard, self._opened(shard).rows[row]

    def _key_of(self, sample: int) -> str:
        try:
            return _key(self._find(sample)[1])
        except BadSample:
            shard, row = self._place(sample)
            return f"{self.manifest.shards[shard].file}#{row}"

    def _opened(self, shard: int) -> _OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= MAX_OPEN:
            self._forget(next(iter(self._open)))
        self._open[shard] = _OpenShard(self._checked_index(shard))
        return self._open[shard]

    def _forget(self, shard: int) -> None:
        opened = self._open.pop(shard, None)
        if opened is not None and opened.file is not None:
            opened.file.close()

    def _checked_index(self, shard: int) -> np.ndarray:
        described = self.manifest.shards[shard]
        name = self.files.at(described.index_file)
        try:
            with self.files.index(described) as path:
                index = load_index(self.directory, described, path)
                # A flipped label would poison the training silently, and to hash the small index once costs little.
                if shard not in self._checked and file_sha256(path) != described.index_sha256:
                    raise BadSample(name, "not the index that the manifest describes", _MEND, lost=True)
        except BadIndex as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                raise self._unreadable(name, error.__cause__) from error
            raise BadSample(name, error.reason, _MEND, lost=True) from error
        except DamagedFile as error:
            raise BadSample(name, error.reason, _MEND, lost=True) from error
        except OSError as error:
            raise self._unreadable(name, error) from error
        self._checked.add(shard)
        return index

    def _map(self, shard: int, offset: int, size: int, key: str) -> bytes:
        described = self.manifest.token_labels
        assert described is not None, "resolve checks that the split has label maps"
        return self._pread(shard, described.bytes, token_labels_offset(offset, size), key)

    def _shape(self, shard: int, sample: int, offset: int, key: str) -> tuple[int, int] | None:
        """`Sample.shape`: a `.beton` says of every image how it is stored."""
        if self.manifest.format != "ffcv" or self.manifest.options.get("write_mode") == "jpg":
            return None
        row = int(sample) - self._starts[shard]
        stored = self._pread(shard, beton.ROW.itemsize, beton.ROWS_START + row * beton.ROW.itemsize, key)
        try:
            return beton.raw_shape(stored, offset)
        except beton.BetonError as error:
            raise BadSample(self._path(shard), str(error), _MEND, key) from error

    def _pread(self, shard: int, size: int, offset: int, key: str) -> bytes:
        opened = self._opened(shard)
        try:
            if opened.file is None:
                opened.file = self.files.open(self.manifest.shards[shard])
            data = opened.file.pread(size, offset)
        except DamagedFile as error:
            self._forget(shard)
            raise BadSample(self._path(shard), error.reason, _MEND, key, lost=True) from error
        except OSError as error:
            lost = opened.file is None
            self._forget(shard)  # as `reopen`
            raise self._unreadable(self._path(shard), error, key, lost) from error
        if len(data) != size:
            self._forget(shard)
            raise BadSample(self._path(shard), f"the file ends inside it, at byte {offset + len(data)}", _MEND, key)
        return data

    def _unreadable(self, path: str, error: OSError, key: str = "", lost: bool = True) -> UserError:
        lost_file = isinstance(error, FileNotFoundError)
        # Those of a store often hold nothing but the address, which the message begins with.
        reason = f"can't be read ({error.strerror or ('not there' if lost_file else error)})"
        if error.errno in _OWN_FAULT:
            return UserError(f"{path}: {reason}; lower data.workers, or give the job more memory and open files")
        mend = f"`rookery verify {self.directory}` checks it"
        return BadSample(path, reason, mend, key, lost=lost, passing=not lost_file)


def _key(row: Any) -> str:
    return row["key"].decode(errors="replace")
