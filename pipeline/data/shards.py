"""Random access to the samples of a directory of WebDataset shards, through its index."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.manifest import Manifest, load_index
from pipeline.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One encoded sample: its key, the bytes of the image file, and its label."""

    key: str
    data: bytes
    label: int


class ShardSet:
    """All samples of one split, numbered through its shards in the manifest's order.

    Reads are positioned (`pread`), so one open file per shard serves any access pattern.

    Raises:
        UserError: no manifest, a shard missing or of another size, an unreadable index.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = Manifest.load(self.directory)
        if self.manifest.format != "webdataset":
            raise UserError(
                f"{self.directory}: format {self.manifest.format!r} has no reader; prepare webdataset shards"
            )
        self._check_files()
        self._starts = np.cumsum([0, *(shard.samples for shard in self.manifest.shards)])
        self._indexes: dict[int, np.ndarray] = {}
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, samples: Iterable[int]) -> Iterator[Sample]:
        """The given samples, in the given order.

        Raises:
            UserError: a shard can't be read, or ends before the sample does.
        """
        for sample in samples:
            shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
            row = self._index(shard)[int(sample) - int(self._starts[shard])]
            data = self._pread(shard, int(row["size"]), int(row["offset"]))
            yield Sample(row["key"].decode(), data, int(row["label"]))

    def keys(self, samples: Iterable[int]) -> list[str]:
        """Keys of the given samples, without reading them."""
        found = []
        for sample in samples:
            shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
            found.append(self._index(shard)[int(sample) - int(self._starts[shard])]["key"].decode())
        return found

    def __getstate__(self) -> dict[str, Any]:
        # A loader process opens the files itself.
        return self.__dict__ | {"_indexes": {}, "_files": {}}

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _check_files(self) -> None:
        # One stat per shard, so that a lost or cut file is reported before the first step rather than in hour nine.
        advice = "restore it, or rebuild it with `rookery prep`; `rookery verify` lists all damage"
        for shard in self.manifest.shards:
            path = self.directory / shard.file
            try:
                size = path.stat().st_size
            except OSError as error:
                raise UserError(f"{path}: shard missing ({error.strerror}); {advice}") from error
            if size != shard.bytes:
                raise UserError(f"{path}: {size} bytes, the manifest says {shard.bytes}; {advice}")

    def _index(self, shard: int) -> np.ndarray:
        if shard not in self._indexes:
            self._indexes[shard] = load_index(self.directory, self.manifest.shards[shard])
        return self._indexes[shard]

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        path = self.directory / self.manifest.shards[shard].file
        try:
            if shard not in self._files:
                self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self._files[shard], size, offset)
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error}); `rookery verify {self.directory}` checks it") from error
        if len(data) != size:
            raise UserError(f"{path}: ends inside a sample (byte {offset + len(data)}); rebuild it with `rookery prep`")
        return data
