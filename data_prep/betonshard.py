"""One FFCV `.beton` and its index, written so that the same samples give the same bytes.

Not ffcv's own writer: that one starts processes and waits for them without end when one dies, keeps what it knows in
shared memory, draws from NumPy's global generator, and can't be told to leave an image out.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from data_prep import beton
from data_prep.images import RAW, Usable
from data_prep.shardwriter import ShardWriter, flush


class BetonShardWriter(ShardWriter):
    """Writes the layout that `data_prep.beton` describes; images are JPEG files or raw pixels.

    The rows come before the images, so room is left for all that are planned; images that were dropped leave a gap.
    """

    suffix = beton.SUFFIX

    def __init__(self, path: Path, index_path: Path, planned: int) -> None:
        super().__init__(path, index_path, planned)
        self._path = path
        self._images = np.zeros(planned, dtype=beton.IMAGE)
        self._end = beton.ROWS_START + planned * beton.ROW.itemsize
        self._page = beton.PAGE

    def add(self, key: str, image: Usable, label: int, tokens: bytes | None = None) -> None:
        assert tokens is None, "the options refuse label maps with this format"
        assert image.extension in ("jpg", RAW), "FFCV reads nothing else"
        offset, size = self._place(len(image.data)), len(image.data)
        mode = beton.RAW if image.extension == RAW else beton.JPEG
        self._images[self.samples] = (mode, image.width, image.height, offset)
        self._file.seek(offset)
        self._file.write(image.data)
        self._rows.append((offset, size, label, key.encode()))
        self._end = offset + size

    def close(self) -> None:
        index = self._index()
        rows = np.zeros(len(index), dtype=beton.ROW)
        rows["image"], rows["label"] = self._images[: len(index)], index["label"]
        allocations = np.zeros(len(index), dtype=beton.ALLOCATION)
        allocations["sample_id"], allocations["ptr"] = np.arange(len(index)), index["offset"]
        allocations["size"] = index["size"]
        header = np.array((beton.VERSION, len(beton.FIELDS), self._page, len(index), self._end), dtype=beton.HEADER)
        self._file.seek(self._end)
        self._file.write(allocations.tobytes())
        self.bytes = self._file.tell()
        self._file.seek(0)
        self._file.write(header.tobytes() + beton.FIELDS.tobytes() + rows.tobytes())
        flush(self._file)
        with open(self._path, "rb") as file:  # what comes first in the file is known last: only now can it be hashed
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._write_index()

    def _place(self, size: int) -> int:
        """Where the next `size` bytes start: at once, unless they would cross a page boundary.

        An image larger than a page makes the pages of the file larger. Those before it stay right: pages begin at
        multiples of their size, a power of two, so that what lies within a small one lies within a large one too.
        """
        page = beton.PAGE
        while page < size:
            page *= 2
        self._page = max(self._page, page)
        fits = self._end // page == (self._end + size - 1) // page
        return self._end if fits else -(-self._end // page) * page
