"""Do the shards still hold what the manifest says?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import beton
from data_prep.cores import usable_cores
from data_prep.errors import DamagedFile, Unreachable, UserError
from data_prep.hashes import file_sha256
from data_prep.manifest import (
    DOWNLOADS,
    INDEX_DTYPE,
    INDEX_SUFFIX,
    MANIFEST_NAME,
    Manifest,
    Shard,
    TokenLabels,
    load_index,
    token_labels_offset,
)
from data_prep.progress import Progress, SilentProgress
from data_prep.remote import RemoteStore
from data_prep.state import SHARD_SUFFIXES, STATE_FOLDER
from data_prep.store import LocalStore, local_path, remote_store
from data_prep.tarscan import Member, TarError, members
from data_prep.token_labels import EXTENSION
from data_prep.wording import counted

REPAIR = "run the same `rookery prep` command again with --repair: it makes only what is damaged"
_LABEL_BYTES = 20
DELETE = "delete it if it is of no use: the manifest doesn't know it"


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file of a split.

    Attributes:
        split: directory of the split.
        file: the file.
        what: what is wrong with it.
        mend: what to do about it.
    """

    split: str
    file: str
    what: str
    mend: str


def split_directories(directory: str | Path) -> list[LocalStore | RemoteStore]:
    """The directory itself if it is a split, else the splits below it; on a server alike.

    Raises:
        UserError: there is no such directory, or nothing in it was prepared.
    """
    remote = remote_store(directory)
    return (
        _remote_splits(remote)
        if remote is not None
        else [LocalStore(path) for path in _local_splits(local_path(directory))]
    )


def _remote_splits(store: RemoteStore) -> list[LocalStore | RemoteStore]:
    if not store.lists or _made_here(store):  # of a web server only the manifest can be asked for
        return [store]
    splits = [store.below(name) for name in store.folders()]
    found = [split for split in splits if _made_here(split)]
    if not found:
        raise UserError(
            f"{store.name}: nothing here was made by `rookery prep`: no {MANIFEST_NAME}, no shards; "
            "name the folder of a split, or the one that holds the splits"
        )
    return [*found]


def _made_here(store: RemoteStore) -> bool:
    files = store.sizes()
    return MANIFEST_NAME in files or any(name.endswith(".idx.npy") for name in files)


def _local_splits(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"{path}: {'a file' if path.exists() else 'no such directory'}; name a folder with shards")
    if _is_split(path):
        return [path]
    splits = _splits_in(path)
    if not splits:
        deeper = [(below, _splits_in(below)) for below in _folders(path)]
        deeper += [(below, _splits_in(below)) for folder, found in deeper if not found for below in _folders(folder)]
        held = [f"{below} ({', '.join(split.name for split in found)})" for below, found in sorted(deeper) if found]
        if held:
            raise UserError(
                f"{path}: not itself a data set, but it holds {counted(len(held), 'data set')}: "
                f"{', '.join(held)}; name {'it' if len(held) == 1 else 'one of them'}"
            )
        raise UserError(f"{path}: nothing here was made by `rookery prep`: no {MANIFEST_NAME}, no shards")
    return splits


def verify(directory: str | Path, workers: int | None = None, progress: Progress | None = None) -> list[Problem]:
    """Check one split, or every split below `directory`: all hashes, sizes, and each index against what its shard says.

    Raises:
        UserError: there is no such directory, or nothing in it was prepared.
    """
    progress = progress or SilentProgress()
    return [
        problem
        for split in split_directories(directory)
        for problem in _verify_split(split, workers or usable_cores(), progress)
    ]


def _verify_split(split: LocalStore | RemoteStore, workers: int, progress: Progress) -> list[Problem]:
    try:
        manifest = Manifest.load(split)
    except Unreachable:  # which says nothing about the manifest
        raise
    except UserError as error:
        mend = "run the same `rookery prep` command again: it finishes the shards and writes the manifest"
        return [Problem(split.name, MANIFEST_NAME, str(error), mend)]
    sizes = split.sizes()
    problems = [Problem(split.name, name, "not in the manifest", DELETE) for name in _extra(sizes, manifest)]

    def check(shard: Shard) -> tuple[Shard, list[Problem]]:
        if isinstance(split, LocalStore):
            found = [*_check_shard(split.path, shard, manifest)]
        else:
            found = _check_remote(split, shard, manifest, sizes)
        return shard, [Problem(split.name, file, what, REPAIR) for file, what in found]

    # Threads suffice: hashing and reading, nearly all of the work, release the interpreter lock.
    with progress.task(f"verify {Path(split.name).name}", manifest.num_samples) as advance:
        threads = ThreadPoolExecutor(workers)
        try:
            for shard, found in threads.map(check, manifest.shards):
                problems += found
                advance(shard.samples)
        finally:
            threads.shutdown(cancel_futures=True)
    return problems


def _check_remote(
    store: RemoteStore, shard: Shard, manifest: Manifest, sizes: Mapping[str, int]
) -> list[tuple[str, str]]:
    """`_check_shard` of a copy; what was damaged on its way once is no damage of the store."""
    if store.lists:
        wrong = [(file, "missing") for file in (shard.file, shard.index_file) if file not in sizes]
        size = sizes.get(shard.file, shard.bytes)
        if size != shard.bytes:
            wrong.append((shard.file, f"{size} bytes, the manifest says {shard.bytes}"))
        if wrong:
            return wrong
    problems: list[tuple[str, str]] = []
    for _ in range(DOWNLOADS):
        try:
            with tempfile.TemporaryDirectory(prefix="rookery-verify-") as folder:
                _copy(store, shard, Path(folder))
                problems = [*_check_shard(Path(folder), shard, manifest)]
        except FileNotFoundError:
            return [(shard.file, "missing, or its index is")]
        except DamagedFile as error:
            return [(shard.file, error.reason)]
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: a copy of {shard.file} can't be written ({error.strerror or error}); "
                "free space, take fewer --workers, or set TMPDIR to another folder"
            ) from error
        if not problems:
            break
    return problems


def _copy(store: RemoteStore, shard: Shard, folder: Path) -> None:
    (folder / shard.index_file).write_bytes(store.read(shard.index_file))
    with open(folder / shard.file, "wb") as file:
        store.fetch(shard.file, shard.bytes, file.fileno())


def _check_shard(directory: Path, shard: Shard, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it) for a shard and its index."""
    file, index = directory / shard.file, directory / shard.index_file
    whole = True
    for path, sha256 in ((file, shard.sha256), (index, shard.index_sha256)):
        what = _damage(path, sha256, shard.bytes if path == file else None)
        if what:
            whole = False
            yield path.name, what
    if whole:
        what = _disagreement(directory, shard, manifest)
        if what:
            yield shard.index_file, what


def _damage(path: Path, sha256: str, size: int | None) -> str | None:
    try:
        actual = path.stat().st_size
        if not path.is_file():
            return "not a regular file"
        if size is not None and actual != size:
            return f"{actual} bytes, the manifest says {size}"
        return None if file_sha256(path) == sha256 else "its contents have changed: the sha256 differs"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable ({error.strerror or error})"


def _disagreement(directory: Path, shard: Shard, manifest: Manifest) -> str | None:
    """How the index differs from what the shard itself says, None if it doesn't."""
    classes, kind = manifest.num_classes, Path(shard.file).suffix[1:]
    try:
        index = load_index(directory, shard)
        with open(directory / shard.file, "rb", buffering=0) as file:
            if manifest.format == "ffcv":
                found = beton.scan(file.fileno())
                if len(found) == len(index):
                    found["key"] = index["key"]  # the shard has none
            else:
                found = _scan(file.fileno(), manifest.token_labels)
    except (UserError, TarError, beton.BetonError, ValueError, OverflowError, OSError) as error:
        return str(error)
    if len(found) != len(index):
        return f"{counted(len(index), 'row')}, but the {kind} holds {counted(len(found), 'sample')}"
    for column in INDEX_DTYPE.names or ():
        wrong = np.flatnonzero(found[column] != index[column])
        if len(wrong):
            row = wrong[0]
            return (
                f"row {row}: {column} is {index[column][row].item()}, in the {kind} it is {found[column][row].item()}"
            )
    if len(index) and not 0 <= index["label"].min() <= index["label"].max() < classes:
        lowest, highest = index["label"].min(), index["label"].max()
        return f"labels from {lowest} to {highest}, but the manifest has {counted(classes, 'class')}"
    if len(np.unique(index["key"])) != len(index):
        return "two samples have the same key"
    return None


def _scan(descriptor: int, tokens: TokenLabels | None) -> np.ndarray:
    """The index that the tar's headers and labels make; the label maps must be where readers look for them."""
    rows = []
    files = members(descriptor)
    for image, label in zip(files, files, strict=True):
        key, _, extension = image.name.partition(".")
        if label.name != f"{key}.cls" or not extension:
            raise TarError(f"{image.name} is followed by {label.name}, not by {key}.cls")
        if tokens is not None:
            expected = Member(f"{key}.{EXTENSION}", token_labels_offset(image.offset, image.size), tokens.bytes)
            found = next(files, None)
            if found != expected:
                raise TarError(f"{label.name} is followed by {found}, not by {expected}")
        if label.size > _LABEL_BYTES:
            raise TarError(f"{label.name} has {label.size} bytes")
        rows.append((image.offset, image.size, int(os.pread(descriptor, label.size, label.offset)), key.encode()))
    return np.array(rows, dtype=INDEX_DTYPE)


def _extra(files: Iterable[str], manifest: Manifest) -> list[str]:
    known = {name for shard in manifest.shards for name in (shard.file, shard.index_file)}
    return sorted(name for name in files if name.endswith(SHARD_SUFFIXES) and name not in known)


def _folders(path: Path) -> list[Path]:
    return sorted(below for below in path.iterdir() if below.is_dir() and not below.name.startswith("."))


def _splits_in(path: Path) -> list[Path]:
    return [below for below in _folders(path) if _is_split(below)]


def _is_split(path: Path) -> bool:
    return (path / MANIFEST_NAME).exists() or (path / STATE_FOLDER).is_dir() or any(path.glob(f"*{INDEX_SUFFIX}"))
