"""Where shards are kept: a folder of this machine, or one on a server that fsspec reaches by an address."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

from data_prep.atomic import sync_directory, write_atomic
from data_prep.hashes import file_sha256

if TYPE_CHECKING:
    from data_prep.remote import RemoteStore

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Store(Protocol):
    """A folder of files. Names of files are relative to it.

    Attributes:
        name: how to call the folder in messages, without credentials.
    """

    name: str

    def at(self, file: str) -> str:
        """How to call a file of the folder in messages."""
        ...

    def below(self, folder: str) -> Store:
        """A folder in this one."""
        ...

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The files that lie directly in the folder, or in one below it, and their sizes."""
        ...

    def folders(self) -> list[str]:
        """Names of the folders directly below, sorted, those that start with a dot left out."""
        ...

    def read(self, file: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def write(self, file: str, data: bytes) -> None:
        """Replace a file; a reader sees the old one or all of the new one."""
        ...

    def publish(self, path: Path, file: str) -> None:
        """Move a finished file of this machine into the folder."""
        ...

    def settle(self) -> None:
        """Make what was published before survive a power failure."""
        ...

    def remove(self, file: str) -> None:
        """Remove a file; nothing happens if there is none."""
        ...

    def sha256(self, file: str) -> str:
        """Hash of a file as it lies in the store, as hexadecimal digits."""
        ...


class LocalStore:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def at(self, file: str) -> str:
        return str(self.path / file)

    def below(self, folder: str) -> LocalStore:
        return LocalStore(self.path / folder)

    def sizes(self, folder: str = "") -> dict[str, int]:
        try:
            with os.scandir(self.path / folder) as entries:
                sizes = ((entry.name, _size(entry)) for entry in entries)
                return {name: size for name, size in sizes if size is not None}
        except FileNotFoundError:
            return {}

    def folders(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir() if path.is_dir() and not path.name.startswith("."))

    def read(self, file: str) -> bytes:
        return (self.path / file).read_bytes()

    def write(self, file: str, data: bytes) -> None:
        write_atomic(self.path / file, data)

    def publish(self, path: Path, file: str) -> None:
        os.replace(path, self.path / file)

    def settle(self) -> None:
        sync_directory(self.path)

    def remove(self, file: str) -> None:
        (self.path / file).unlink(missing_ok=True)

    def sha256(self, file: str) -> str:
        return file_sha256(self.path / file)


def _size(entry: os.DirEntry[str]) -> int | None:
    """Bytes of a file, -1 of one that can't be looked at (a link to itself), None of anything else."""
    try:
        return entry.stat().st_size if entry.is_file() else None
    except OSError:
        return -1


def is_remote(place: str | Path) -> bool:
    """Whether it is an address, and no path of this machine (which `file://` is)."""
    return isinstance(place, str) and bool(_URL.match(place)) and not place.startswith("file://")


def local_path(place: str | Path) -> Path:
    """The path of a place that is not remote."""
    if isinstance(place, str) and place.startswith("file://"):
        return Path(unquote(urlsplit(place).path))
    return Path(place)


def remote_store(place: str | Path) -> RemoteStore | None:
    """The store of an address; None for a path of this machine."""
    if not is_remote(place):
        return None
    from data_prep.remote import RemoteStore

    return RemoteStore(str(place))


def open_store(place: str | Path) -> LocalStore | RemoteStore:
    """The store of a path or of an address; nothing is looked up yet."""
    return remote_store(place) or LocalStore(local_path(place))
