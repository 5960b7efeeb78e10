"""One WebDataset tar and its index, written so that the same samples give the same bytes."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

from data_prep.images import Usable
from data_prep.shardwriter import ShardWriter, flush
from data_prep.token_labels import EXTENSION

END_MARK = bytes(2 * tarfile.BLOCKSIZE)


class TarShardWriter(ShardWriter):
    """Writes `key.<extension>`, `key.cls` and, where there is a label map, `key.tokens.npy` per sample.

    Plain ustar, with time, owner and group zero.
    """

    suffix = ".tar"

    def __init__(self, path: Path, index_path: Path, planned: int = 0) -> None:
        super().__init__(path, index_path, planned)
        self._digest = hashlib.sha256()

    def add(self, key: str, image: Usable, label: int, tokens: bytes | None = None) -> None:
        offset = self._member(f"{key}.{image.extension}", image.data)
        self._member(f"{key}.cls", str(label).encode())
        if tokens is not None:  # third: `manifest.token_labels_offset` relies on it
            self._member(f"{key}.{EXTENSION}", tokens)
        self._rows.append((offset, len(image.data), label, key.encode()))

    def close(self) -> None:
        self._write(END_MARK)
        self.sha256 = self._digest.hexdigest()
        flush(self._file)
        self._write_index()

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
