"""A folder on a server: the one place that knows fsspec.

Every request has a time limit and is tried again when its failure may pass (`data_prep.attempts`). Large files come in
pieces, a few at a time, so that a connection that stalls or breaks costs one piece.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from data_prep.attempts import Patience, attempt, mend, refuses_range
from data_prep.clients import before_connecting, connected, reading
from data_prep.errors import DamagedFile, UserError
from data_prep.redact import HIDDEN, redact
from data_prep.threads import in_parallel, within

PIECE = 8 * 2**20
PARALLEL = 4

_PARTS = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_S3_KEY = re.compile(r"(?P<key>[^/:@]+):(?P<secret>.+)@(?P<rest>[^@]*)")
_WEB = ("http", "https")
_MEND = "restore the file, or make it anew (`rookery verify` checks all of a split)"


class RemoteStore:
    """See `data_prep.store.Store`. Can be pickled; connects when it is first used.

    Attributes:
        name: the address without credentials.
        protocol: `s3`, `https`, ...
    """

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        parts = _PARTS.fullmatch(url)
        assert parts is not None, "callers have seen that it is an address"
        self.protocol = parts["protocol"].lower()
        address, mark, query = parts["rest"].partition("?") if self.protocol in _WEB else (parts["rest"], "", "")
        address, self._options = _credentials(self.protocol, address)
        self._address = f"{self.protocol}://{address.rstrip('/')}"
        self._query = mark + query
        self.name = redact(self._address + self._query)
        self.patience = patience or Patience.of_environment()
        self._connected: Any = None

    def at(self, file: str) -> str:
        return str(redact(self._url(file)))

    def below(self, folder: str) -> RemoteStore:
        store = RemoteStore(self._url(folder), self.patience)
        store._options = self._options
        return store

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The files directly in the folder; servers of web pages list none."""
        return {name: int(entry["size"] or 0) for name, entry in self._list(folder) if entry["type"] == "file"}

    def folders(self) -> list[str]:
        return sorted(
            name for name, entry in self._list("") if entry["type"] == "directory" and not name.startswith(".")
        )

    @property
    def lists(self) -> bool:
        """Whether the server tells which files it has."""
        return self.protocol not in _WEB

    def read(self, file: str) -> bytes:
        return bytes(self._request("cat_file", file, **reading(self.protocol)))

    def read_range(self, file: str, start: int, size: int) -> bytes:
        """`size` bytes from `start` on.

        Raises:
            FileNotFoundError: there is no such file.
            DamagedFile: the store has less of the file.
            UserError: the store can't be read.
        """
        data = self._range(file, start, size)
        return data if len(data) == size else data[start : start + size]

    def fetch(self, file: str, size: int, into: int, on_bytes: Callable[[int], None] = lambda count: None) -> None:
        """Write a file of known size into an open one, from its start.

        Args:
            into: descriptor of a file on this machine.
            on_bytes: called with the number of bytes whenever some came.

        Raises:
            FileNotFoundError: there is no such file.
            DamagedFile: the store has less of the file.
            UserError: the store can't be read.
            OSError: the file on this machine can't be written.
        """
        for start, data in self._pieces(file, size):
            write_all(into, data, start)
            on_bytes(len(data))

    def _pieces(self, file: str, size: int) -> Iterator[tuple[int, bytes]]:
        """All of a file, as (first byte, bytes) in any order."""
        starts = list(range(0, size, PIECE))

        def piece(start: int) -> bytes:
            return self._range(file, start, min(PIECE, size - start))

        if self.protocol in _WEB and len(starts) > 1:
            data = piece(0)
            yield 0, data
            if len(data) == size:  # a server that does not send parts of files
                return
            starts = starts[1:]
        yield from in_parallel(piece, starts, PARALLEL)

    def _range(self, file: str, start: int, size: int) -> bytes:
        """`size` bytes from `start` on; from some servers of web pages all of the file instead."""
        if size == 0:
            return b""

        short = 0

        def request() -> bytes:
            nonlocal short
            try:
                options = {"start": start, "end": start + size} | reading(self.protocol, start + size)
                data = bytes(self._call("cat_file", self._path(file), size, **options))
                if len(data) < size:
                    raise EOFError(f"{len(data)} bytes of {size} from byte {start} on")
            except Exception as error:
                # A connection may break once, and the sizes that web servers tell are not always true.
                short += isinstance(error, EOFError)
                if short > 1 or refuses_range(error):
                    self._check_size(file, start + size)
                raise
            return data

        return bytes(self._attempt(request, file))

    def _check_size(self, file: str, size: int) -> None:
        """Raise DamagedFile if the store says that it has less than these bytes of a file; it need not say anything."""
        try:
            self._fs.invalidate_cache()
            there = self._call("info", self._path(file), 0).get("size")
        except Exception:
            return
        if there is not None and there < size:
            raise DamagedFile(self.at(file), f"{there} bytes are there, {size} are wanted", _MEND)

    def write(self, file: str, data: bytes) -> None:
        self._send("pipe_file", file, len(data), self._path(file), data)

    def publish(self, path: Path, file: str) -> None:
        """Upload a file, see that all of it is there, and remove it here."""
        size = path.stat().st_size
        self._send("put_file", file, size, str(path), self._path(file))
        stored = self._request("info", file)["size"]
        if stored != size:
            raise UserError(f"{self.at(file)}: {stored} of {size} bytes were stored; run the same command again")
        path.unlink()

    def settle(self) -> None:
        """Nothing: the answer to a request says that it is done."""

    def remove(self, file: str) -> None:
        self._check_writable()
        try:
            self._request("rm_file", file)
        except FileNotFoundError:
            return

    def sha256(self, file: str) -> str:
        size = int(self._request("info", file)["size"])
        digest = hashlib.sha256()
        for start in range(0, size, PIECE):
            digest.update(self.read_range(file, start, min(PIECE, size - start)))
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connected": None}

    def _list(self, folder: str) -> list[tuple[str, dict[str, Any]]]:
        path = self._path(folder)

        def request() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()
            return list(self._call("ls", path, 0, detail=True))

        try:
            entries = self._attempt(request, folder)
        except FileNotFoundError:
            return []
        except UserError:
            if self.protocol in _WEB:  # most of them have no page that lists files
                return []
            raise
        found = [(str(entry["name"]).rstrip("/").rpartition("/")[2], entry) for entry in entries]
        return [(name, entry) for name, entry in found if name]

    def _url(self, file: str) -> str:
        return f"{self._address}/{file}{self._query}" if file else self._address + self._query

    def _path(self, file: str) -> str:
        """A file as the methods of the file system name it."""
        return str(self._fs._strip_protocol(self._url(file)))

    def _request(self, method: str, file: str, **options: Any) -> Any:
        return self._attempt(lambda: self._call(method, self._path(file), 0, **options), file)

    def _send(self, method: str, file: str, size: int, *args: Any) -> None:
        self._check_writable()
        try:
            self._attempt(lambda: self._call(method, args[0], size, *args[1:]), file)
        except FileNotFoundError as error:
            said = error.strerror or error
            raise UserError(f"{self.at(file)}: can't be written ({said}); make the bucket or folder first") from error

    def _check_writable(self) -> None:
        if self.protocol in _WEB:
            raise UserError(f"{self.name}: can't be written; choose an OUT on s3://, gs:// or a path of this machine")
        if self.protocol == "hf":
            raise UserError(
                f"{self.name}: can't be written, for every file would be a commit, of which the Hub allows few in an "
                "hour; prepare into a folder, then `hf upload NAMESPACE/NAME FOLDER . --repo-type dataset`"
            )

    def _attempt(self, request: Callable[[], Any], file: str) -> Any:
        return attempt(request, self.at(file), self.protocol, self.patience)

    def _call(self, method: str, first: str, size: int, /, *args: Any, **options: Any) -> Any:
        """Call a method of the file system, within the time that this many bytes may take."""
        seconds = self.patience.seconds * max(1.0, size / PIECE)
        fs = self._fs
        if fs.async_impl:
            from fsspec.asyn import sync

            return sync(fs.loop, getattr(fs, f"_{method}"), first, *args, timeout=seconds, **options)
        return within(seconds, lambda: getattr(fs, method)(first, *args, **options))

    @property
    def _fs(self) -> Any:
        if self._connected is None:
            self._connected = self._attempt(self._connect, "")
        return self._connected

    def _connect(self) -> Any:
        before_connecting(self.protocol)
        import fsspec
        from fsspec.registry import known_implementations, registry

        if self.protocol not in known_implementations and self.protocol not in registry:
            raise UserError(f"{self.name}: no such protocol; use s3://, gs://, abfs://, hf://, https:// or a path")
        try:
            # What lies there is asked for afresh: another process may have written it.
            fs, _ = fsspec.core.url_to_fs(self._address + self._query, use_listings_cache=False, **self._options)
        except ImportError as error:
            known = known_implementations.get(self.protocol, {}).get("err", str(error))
            package = f"; pip install {_PACKAGES[self.protocol]}" if self.protocol in _PACKAGES else ""
            raise UserError(f"{self.name}: a package is missing ({known}){package}") from error
        except ValueError as error:
            raise UserError(f"{self.name}: {error}; {mend(self.protocol)}") from error
        return connected(self.protocol, fs)


_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}


def _credentials(protocol: str, address: str) -> tuple[str, dict[str, str]]:
    """An address without the credentials that fsspec would not find in it, and those as options."""
    if address.startswith(f"{HIDDEN}@"):  # as a run's saved config has it: they come from elsewhere now
        return address.removeprefix(f"{HIDDEN}@"), {}
    if protocol in ("s3", "s3a") and (found := _S3_KEY.fullmatch(address)):
        return found["rest"], {"key": unquote(found["key"]), "secret": unquote(found["secret"])}
    return address, {}


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of the data into an open file, from this byte of it on."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
