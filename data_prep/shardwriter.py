"""What all shard writers share: the index beside the shard, and a clean end."""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.images import Usable
from data_prep.manifest import INDEX_DTYPE


class ShardWriter(ABC):
    """Writes one shard and its index, the same samples to the same bytes.

    After `close()`, `bytes`, `sha256`, `index_bytes` and `index_sha256` describe the two files, which are on the disk.

    Args:
        path, index_path: the two files.
        planned: samples that may come, at most; some formats need to know it before the first.
    """

    suffix: ClassVar[str]

    def __init__(self, path: Path, index_path: Path, planned: int = 0) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  (closed by close or abort)
        self._index_path = index_path
        self._rows: list[tuple[int, int, int, bytes]] = []
        self.planned = planned
        self.bytes = 0
        self.sha256 = self.index_sha256 = ""
        self.index_bytes = 0

    @property
    def samples(self) -> int:
        return len(self._rows)

    @abstractmethod
    def add(self, key: str, image: Usable, label: int, tokens: bytes | None = None) -> None:
        """Append one sample; `tokens` is its label map as an `.npy` file."""

    @abstractmethod
    def close(self) -> None:
        """Finish the shard and write the index, and flush both files to the disk."""

    def abort(self) -> None:
        """Let go of the file; what was written is of no use. Nothing happens after `close()`."""
        with suppress(OSError):  # a full disk refuses the buffered rest as well
            self._file.close()

    def _index(self) -> np.ndarray:
        return np.array(self._rows, dtype=INDEX_DTYPE)

    def _write_index(self) -> None:
        buffer = io.BytesIO()
        np.save(buffer, self._index(), allow_pickle=False)
        index = buffer.getvalue()
        self.index_bytes, self.index_sha256 = len(index), hashlib.sha256(index).hexdigest()
        with open(self._index_path, "wb") as file:
            file.write(index)
            flush(file)


def flush(file: io.BufferedWriter) -> None:
    """Flush a file to the disk and close it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
