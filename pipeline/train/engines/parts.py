"""A file in parts, for where files may only be so large."""

from __future__ import annotations

import io
from pathlib import Path
from types import TracebackType
from typing import IO, Self


class PartsWriter:
    """Takes bytes in order and writes them to `name.001`, `name.002`, ... beside each other.

    Args:
        path: of the whole, `name`.
        most: bytes of a part.
    """

    def __init__(self, path: Path, most: int) -> None:
        self._path, self._most, self._number, self._room = path, most, 0, 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, data: bytes) -> int:
        view, written = memoryview(data), 0
        while written < len(view):
            if self._file is None or self._room == 0:
                self._next()
            assert self._file is not None
            piece = view[written : written + self._room]
            self._file.write(piece)
            written += len(piece)
            self._room -= len(piece)
        return written

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def _next(self) -> None:
        if self._file is not None:
            self._file.close()
        self._number += 1
        self._file = open(f"{self._path}.{self._number:03}", "wb")  # noqa: SIM115
        self._room = self._most


def parts_of(path: Path) -> list[Path]:
    """In their order; none where the file is whole or missing."""
    return sorted(path.parent.glob(f"{path.name}.[0-9][0-9][0-9]"))


def opened(parts: list[Path]) -> IO[bytes]:
    """The whole, in memory."""
    return io.BytesIO(b"".join(part.read_bytes() for part in parts))
