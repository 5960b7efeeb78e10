"""Standard streams that are closed, full, or left by their reader."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def open_closed() -> None:
    """Open the null device for standard streams that were closed (`>&-`).

    Otherwise the next file that is opened, a checkpoint perhaps, gets the number of such a stream, and what libraries
    print there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def name_output() -> None:
    """From here on an error of the standard output says that it is one of the output; by itself it has no name.

    And what its encoding lacks is no error, but escaped, as in the standard error.
    """
    sys.stdout = _around(sys.stdout, _Named)


def drop_unprintable() -> None:
    """From here on what can't be printed is lost, and nothing else.

    For work whose results are files: a log on a full disk, or a reader that left (`| head`), must not end it.
    """
    sys.stdout, sys.stderr = _around(sys.stdout, _Forgiving), _around(sys.stderr, _Forgiving)


def abandon() -> None:
    """Let what waits to be printed go nowhere, so that the interpreter's own end does not fail at it once more."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())


class _Raw(io.RawIOBase):
    """A file descriptor that stays open when this is closed."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def writable(self) -> bool:
        return True


class _Named(_Raw):
    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return os.write(self._number, data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "the output") from error


class _Forgiving(_Raw):
    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return os.write(self._number, data)
        except OSError:
            return len(data)


def _around(stream: TextIO, kind: type[_Raw]) -> TextIO:
    """A stream like this one on the same file; itself where there is none behind it, as in a test."""
    try:
        stream.flush()
        number = stream.fileno()
    except (OSError, ValueError):
        return stream
    line_buffering = getattr(stream, "line_buffering", False)
    buffer = io.BufferedWriter(kind(number))
    errors = "backslashreplace" if stream.errors == "strict" else stream.errors
    return io.TextIOWrapper(buffer, stream.encoding, errors, line_buffering=line_buffering)
