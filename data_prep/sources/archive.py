"""Files out of a tar, compressed or not, within limits: it may claim, and unpack to, anything."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from data_prep.errors import UserError
from data_prep.sources.base import reading

# CIFAR-100's archives unpack to 186 MB, with a file of 155 MB; the ILSVRC2012 devkit to less.
MAX_FILE = 256 * 2**20
MAX_ARCHIVE = 2**30
_COMPRESSIONS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


def read_files(path: Path, names: set[str]) -> dict[str, bytes]:
    """The files of these names in an archive, wherever in it they lie; of those that it has.

    Raises:
        UserError: it is damaged, or absurdly large.
    """
    found: dict[str, bytes] = {}
    with _opened(path) as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            if name in names and member.isreg():
                if member.size > MAX_FILE:  # a sparse one takes no room in the archive
                    raise ValueError(f"{name} of {member.size} bytes")
                file = archive.extractfile(member)
                assert file is not None, "a regular member has content"
                found[name] = file.read()
    return found


def read_whole(path: Path) -> bytes:
    """A file beside others, as an archive would hold it.

    Raises:
        UserError: it can't be read, or is absurdly large.
    """
    with reading(path):
        if path.stat().st_size > MAX_FILE:
            raise UserError(f"{path}: {path.stat().st_size} bytes are too many for it; fetch it again")
        return path.read_bytes()


def first_name(path: Path) -> str:
    """Name of the first member of an archive; empty when it is none."""
    try:
        with _opened(path) as archive:
            first = archive.next()
    except UserError:
        return ""
    return "" if first is None else first.name


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    with reading(path), open(path, "rb") as raw:
        magic = raw.read(6)
        raw.seek(0)
        unpack = next((unpack for start, unpack in _COMPRESSIONS.items() if magic.startswith(start)), None)
        try:
            limited = cast(IO[bytes], _Limited(raw if unpack is None else unpack(raw)))
            with tarfile.open(fileobj=limited, mode="r:") as archive:
                yield archive
        except UserError:
            raise
        except OSError as error:
            if error.errno is not None:  # else of the decompression
                raise
            raise _damaged(path, error) from error
        except Exception as error:  # tarfile and the decompressors raise nearly every type on damaged bytes
            raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged archive ({error or type(error).__name__}); fetch it again")


class _Limited:
    """A file that refuses to be read, or skipped over, beyond the limits."""

    def __init__(self, file: IO[Any]) -> None:
        self._file = file
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_FILE:
            raise ValueError(f"a file of {size} bytes")
        self._check(self._file.tell() + size)
        return self._file.read(size)

    def seek(self, position: int) -> int:
        self._check(position)
        return self._file.seek(position)

    def _check(self, position: int) -> None:
        if position > MAX_ARCHIVE:
            raise ValueError(f"more than {MAX_ARCHIVE} bytes")
