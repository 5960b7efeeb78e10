"""Where the members of a tar stand, found by positioned reads of its headers alone."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = tarfile.BLOCKSIZE
# A long name or a pax header is read as a whole; no real one comes near.
MAX_EXTRA = 2**20
_CHUNK = 2**20


class TarError(Exception):
    """The bytes are not a whole tar; the message says why and at which byte."""


class Member(NamedTuple):
    """A regular file inside a tar; `offset` counts from the start of the file that was scanned."""

    name: str
    offset: int
    size: int


def members(
    descriptor: int, start: int = 0, end: int | None = None, others: list[str] | None = None
) -> Iterator[Member]:
    """The regular members of the tar that lies in bytes [start, end) of an open file.

    Understands ustar, GNU long names and pax paths and sizes. Uses `os.pread` only: any number of threads may scan
    one descriptor, and a tar inside a tar is scanned in place.

    Args:
        others: gets the names of links, devices and pipes.

    Raises:
        TarError: a damaged header, the tar ends before its end mark, or goes on behind it.
    """
    end = os.fstat(descriptor).st_size if end is None else end
    position = start
    override: dict[str, str] = {}
    while True:
        header = os.pread(descriptor, min(BLOCK, end - position), position) if position < end else b""
        if len(header) < BLOCK:
            raise TarError(f"truncated: it ends at byte {end - start} without an end mark")
        if not header.strip(b"\0"):
            _check_end(descriptor, position, start, end)
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise TarError(f"damaged header at byte {position - start} ({error})") from error
        size = _size(override["size"]) if "size" in override else info.size
        if size < 0:  # base-256 numbers have a sign, and a step back would never end
            raise TarError(f"damaged header at byte {position - start} (size {size})")
        extra = info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE)
        if extra and size > MAX_EXTRA:
            raise TarError(f"damaged header at byte {position - start} (a name of {size} bytes)")
        offset = position + BLOCK
        position = offset + -(-size // BLOCK) * BLOCK
        if offset + size > end:
            raise TarError(
                f"truncated: {info.name} should end at byte {offset + size - start}, the tar at {end - start}"
            )
        if info.type == tarfile.GNUTYPE_LONGNAME:
            name = os.pread(descriptor, size, offset).rstrip(b"\0")
            override["path"] = name.decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE:
            override |= _pax(os.pread(descriptor, size, offset))
        elif info.type != tarfile.XGLTYPE:
            if info.isreg():
                yield Member(override.get("path", info.name), offset, size)
            elif others is not None and not info.isdir():
                others.append(override.get("path", info.name))
            override = {}


def _check_end(descriptor: int, position: int, start: int, end: int) -> None:
    """A hole that a disk left in a tar looks like its end mark, but more of it follows."""
    for place in range(position, end, _CHUNK):
        data = os.pread(descriptor, min(_CHUNK, end - place), place)
        if data.count(0) != len(data):
            raise TarError(f"damaged: it goes on behind an end mark at byte {position - start}")


def _pax(data: bytes) -> dict[str, str]:
    """Path and size from a pax header: records of the form "length key=value\\n"."""
    found = {}
    while data:
        digits, _, _ = data.partition(b" ")
        if not 0 < _size(digits.decode("ascii", "replace")) <= len(data):
            raise TarError("damaged pax header")
        record, data = data[: int(digits)], data[int(digits) :]
        key, _, value = record[len(digits) + 1 : -1].partition(b"=")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
    return found


def _size(digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise TarError("damaged pax header")
    return int(digits)
