"""A file in parts, for where files may only be so large."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import TracebackType
from typing import IO, Self


class PartsWriter:
    """Takes bytes in order and writes them to `name.00001`, `name.00002`, ... beside each other.

    How many there are is in `name.parts` in the end, so that what lies beside them is not taken for one.

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
        if error is None:
            _index(self._path).write_text(json.dumps({"parts": self._number}))

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
        self._file = open(part_of(self._path, self._number), "wb")  # noqa: SIM115
        self._room = self._most


def part_of(path: Path, number: int) -> Path:
    """The place of one part, counted from 1."""
    return path.with_name(f"{path.name}.{number:05}")


def in_parts(path: Path) -> bool:
    """Whether the file was written in parts."""
    return _index(path).exists()


def opened(path: Path) -> IO[bytes]:
    """The whole, in memory.

    Raises:
        OSError: a part is missing.
        RuntimeError: what says how many there are is damaged.
    """
    try:
        count = int(json.loads(_index(path).read_text())["parts"])
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{_index(path)} is damaged") from error
    return io.BytesIO(b"".join(part_of(path, number).read_bytes() for number in range(1, count + 1)))


def _index(path: Path) -> Path:
    return path.with_name(f"{path.name}.parts")
