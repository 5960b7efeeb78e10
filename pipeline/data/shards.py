"""Random access to the samples of a directory of WebDataset or FFCV shards, through its index."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep import beton
from data_prep.hashes import file_sha256
from data_prep.manifest import Manifest, load_index, token_labels_offset
from pipeline.data.cache_room import CacheOptions
from pipeline.data.files import ShardFile, open_files
from pipeline.errors import UserError

# An open shard holds two file descriptors, of which a process often has no more than 1,024.
MAX_OPEN = 256
FORMATS = ("webdataset", "ffcv")


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


class _OpenShard(NamedTuple):
    file: ShardFile
    rows: np.ndarray


class ShardSet:
    """All samples of one split, numbered through its shards in the manifest's order.

    Reads are positioned (`pread`), so one open file per shard serves any access pattern. The `MAX_OPEN` shards that
    were used last stay open.

    Args:
        directory: path or address of the split.
        cache: the node's cache for what has an address; None: every sample is a request, right for a few of them.

    Raises:
        UserError: no manifest, or a shard that is missing or of another size.
    """

    def __init__(self, directory: str | Path, cache: CacheOptions | None = None) -> None:
        self.files = open_files(directory, cache)
        self.directory = self.files.name
        self.manifest = Manifest.load(directory)
        if self.manifest.format not in FORMATS:
            raise UserError(
                f"{self.directory}: format {self.manifest.format!r} has no reader; there is one for "
                f"{' and '.join(FORMATS)} shards"
            )
        self._check_files()
        self._starts = np.cumsum([0, *(shard.samples for shard in self.manifest.shards)])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, samples: Iterable[int], tokens: bool = False) -> Iterator[Sample]:
        """The given samples, in the given order; with `tokens` their label maps too, which the split must have.

        Raises:
            UserError: a shard can't be read or ends before the sample does, or its index was changed.
        """
        for sample in samples:
            shard, row = self._find(sample)
            offset, size = int(row["offset"]), int(row["size"])
            data = self._pread(shard, size, offset)
            yield Sample(
                row["key"].decode(),
                data,
                int(row["label"]),
                self._map(shard, offset, size) if tokens else None,
                self._shape(shard, sample, offset),
            )

    def keys(self, samples: Iterable[int]) -> list[str]:
        """Keys of the given samples, without reading them."""
        return [self._find(sample)[1]["key"].decode() for sample in samples]

    def close(self) -> None:
        """Close all files; reading opens them again."""
        while self._open:
            self._open.popitem()[1].file.close()

    def __getstate__(self) -> dict[str, Any]:
        # A loader process opens the files itself.
        return self.__dict__ | {"_open": OrderedDict()}

    def _check_files(self) -> None:
        # One stat per shard, so that a lost or cut file is reported before the first step rather than in hour nine.
        advice = "restore it, or rebuild it with `rookery prep --repair`; `rookery verify` lists all damage"
        for shard in self.manifest.shards:
            path = self.files.at(shard.file)
            try:
                size = self.files.size(shard)
            except OSError as error:
                raise UserError(f"{path}: shard missing ({error.strerror}); {advice}") from error
            if size != shard.bytes:
                raise UserError(f"{path}: {size} bytes, the manifest says {shard.bytes}; {advice}")

    def _find(self, sample: int) -> tuple[int, Any]:
        """Shard and index row of a sample."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, self._opened(shard).rows[int(sample) - int(self._starts[shard])]

    def _opened(self, shard: int) -> _OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= MAX_OPEN:
            self._open.popitem(last=False)[1].file.close()
        described = self.manifest.shards[shard]
        index = self._checked_index(shard)
        try:
            file = self.files.open(described)
        except OSError as error:
            raise self._unreadable(described.file, error) from error
        self._open[shard] = _OpenShard(file, index)
        return self._open[shard]

    def _checked_index(self, shard: int) -> np.ndarray:
        described = self.manifest.shards[shard]
        try:
            with self.files.index(described) as path:
                index = load_index(self.directory, described, path)
                # A flipped label would poison the training silently, and to hash the small index once costs little.
                if shard not in self._checked and file_sha256(path) != described.index_sha256:
                    raise UserError(
                        f"{self.files.at(described.index_file)}: not the index that the manifest describes; "
                        "rebuild it with `rookery prep --repair`"
                    )
        except OSError as error:
            raise self._unreadable(described.index_file, error) from error
        self._checked.add(shard)
        return index

    def _map(self, shard: int, offset: int, size: int) -> bytes:
        described = self.manifest.token_labels
        assert described is not None, "resolve checks that the split has label maps"
        return self._pread(shard, described.bytes, token_labels_offset(offset, size))

    def _shape(self, shard: int, sample: int, offset: int) -> tuple[int, int] | None:
        """`Sample.shape`: a `.beton` says of every image how it is stored."""
        if self.manifest.format != "ffcv" or self.manifest.options.get("write_mode") == "jpg":
            return None
        row = int(sample) - int(self._starts[shard])
        stored = self._pread(shard, beton.ROW.itemsize, beton.ROWS_START + row * beton.ROW.itemsize)
        try:
            return beton.raw_shape(stored, offset)
        except beton.BetonError as error:
            path = self.files.at(self.manifest.shards[shard].file)
            raise UserError(f"{path}: {error}; rebuild it with `rookery prep --repair`") from error

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        file = self.manifest.shards[shard].file
        try:
            data = self._opened(shard).file.pread(size, offset)
        except OSError as error:
            raise self._unreadable(file, error) from error
        if len(data) != size:
            raise UserError(
                f"{self.files.at(file)}: ends inside a sample (byte {offset + len(data)}); "
                "rebuild it with `rookery prep --repair`"
            )
        return data

    def _unreadable(self, file: str, error: OSError) -> UserError:
        return UserError(f"{self.files.at(file)}: can't be read ({error}); `rookery verify {self.directory}` checks it")
