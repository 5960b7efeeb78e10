"""One WebDataset tar and its index, written so that the same samples give the same bytes."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from data_prep.manifest import INDEX_DTYPE
from data_prep.token_labels import EXTENSION

END_MARK = bytes(2 * tarfile.BLOCKSIZE)


class TarShardWriter:
    """Writes `key.<extension>`, `key.cls` and, where there is a label map, `key.tokens.npy` per sample.

    Plain ustar, with time, owner and group zero.

    After `close()`, `bytes`, `sha256`, `index_bytes` and `index_sha256` describe the two files, which are on the disk.
    """

    suffix = ".tar"

    def __init__(self, path: Path, index_path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  (closed by close or abort)
        self._index_path = index_path
        self._digest = hashlib.sha256()
        self._rows: list[tuple[int, int, int, bytes]] = []
        self.bytes = 0
        self.sha256 = self.index_sha256 = ""
        self.index_bytes = 0

    @property
    def samples(self) -> int:
        return len(self._rows)

    def add(self, key: str, extension: str, data: bytes, label: int, tokens: bytes | None = None) -> None:
        """Append one sample; `tokens` is its label map as an `.npy` file."""
        offset = self._member(f"{key}.{extension}", data)
        self._member(f"{key}.cls", str(label).encode())
        if tokens is not None:  # third: `manifest.token_labels_offset` relies on it
            self._member(f"{key}.{EXTENSION}", tokens)
        self._rows.append((offset, len(data), label, key.encode()))

    def close(self) -> None:
        """Write the end mark and the index, and flush both files to the disk."""
        self._write(END_MARK)
        self.sha256 = self._digest.hexdigest()
        _flush(self._file)
        buffer = io.BytesIO()
        np.save(buffer, np.array(self._rows, dtype=INDEX_DTYPE), allow_pickle=False)
        index = buffer.getvalue()
        self.index_bytes, self.index_sha256 = len(index), hashlib.sha256(index).hexdigest()
        with open(self._index_path, "wb") as file:
            file.write(index)
            _flush(file)

    def abort(self) -> None:
        """Let go of the file; what was written is of no use. Nothing happens after `close()`."""
        with suppress(OSError):  # a full disk refuses the buffered rest as well
            self._file.close()

    def _member(self, name: str, data: bytes) -> int:
        header = tarfile.TarInfo(name)
        header.size = len(data)
        header.mode = 0o644
        self._write(header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        offset = self.bytes
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


def _flush(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
