"""The manifest: what a directory of shards holds, and how to check that it still does.

One directory per split::

    train/
        manifest.json            this file's `Manifest`
        train-000000.tar         samples; a standard WebDataset tar (key.jpg + key.cls, + key.tokens.npy)
        train-000000.idx.npy     one `INDEX_DTYPE` row per sample of that tar
        ...

or `train-000000.beton`, a data set that FFCV opens (`data_prep.beton`), in the place of the tar.

The index gives the byte range and label of every sample, so a reader reaches any sample with one positioned read and
no scan of the shard. Of `data_prep` training code imports this module, `data_prep.beton`, `data_prep.npy` and
`data_prep.store` alone; they need NumPy, and fsspec where the directory is on a server.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.errors import UserError
from data_prep.npy import map_npy
from data_prep.store import LocalStore, Store, is_remote, local_path, open_store

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
INDEX_SUFFIX = ".idx.npy"
# How often a file from a server may arrive damaged.
DOWNLOADS = 3
FORMATS = ("webdataset", "ffcv")
KEY_BYTES = 64

# `offset` and `size` delimit the image bytes inside the shard file, `key` is the sample key padded with NULs.
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u8"), ("label", "<i8"), ("key", f"S{KEY_BYTES}")])

TAR_BLOCK = 512

# What `rookery prep` lets through, and so what a reader has to expect: a damaged size must not cost all memory.
MAX_SIDE = 20_000
MAX_PIXELS = 100_000_000
MAX_RATIO = 100
MAX_BYTES = 64 * 2**20
# A sample of a tar is two headers, a block of the label and one of the image at least.
_MIN_TAR_BYTES = 4 * TAR_BLOCK


def is_absurd(width: int, height: int) -> bool:
    """Whether a picture of that size is refused: decoded, or with its shorter side resized, it would take gigabytes."""
    short, long = sorted((width, height))
    return long > MAX_SIDE or short * long > MAX_PIXELS or long > MAX_RATIO * short


class TokenLabels(NamedTuple):
    """The dense label map (`key.tokens.npy`) that every sample of a split has.

    Attributes:
        shape: (2, k, rows, columns): the k largest logits of every cell, then their classes.
        dtype: NumPy's name of the type.
        bytes: size of the `.npy` file.
    """

    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Shard:
    """One shard file.

    Attributes:
        file: name of the shard, relative to the manifest's directory.
        samples: number of samples in it.
        bytes: size of the file.
        sha256: hash of the file.
        index_sha256: hash of its index file.
    """

    file: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_file(self) -> str:
        return Path(self.file).stem + INDEX_SUFFIX


@dataclass(frozen=True)
class BadImage:
    """One image of the source that is not, or not unchanged, in the shards.

    Attributes:
        source: where it stands in the source (a path, `tar!member`, `parquet#row`).
        reason: what is wrong with it.
        action: what was done (`dropped`, or the repair).
    """

    source: str
    reason: str
    action: str


@dataclass(frozen=True)
class Manifest:
    """Everything about one split.

    Attributes:
        format: `webdataset` or `ffcv`.
        split: name of the split.
        classes: class names; the label of a sample is the position of its class here.
        shards: the shards, in order.
        options: the options of the preparation that change the bytes of the shards.
        source: kind, path and fingerprint of the source.
        quarantine: images of the source that were dropped or repaired.
    """

    format: str
    split: str
    classes: list[str]
    shards: list[Shard]
    options: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    quarantine: list[BadImage] = field(default_factory=list)
    version: int = MANIFEST_VERSION

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def token_labels(self) -> TokenLabels | None:
        """What is known of the samples' label maps; None if they have none."""
        described = self.options.get("token_labels")
        return described and TokenLabels(tuple(described["shape"]), described["dtype"], described["bytes"])

    def fingerprint(self) -> str:
        """Hash of the *contents*: classes and shard hashes, so two preparations of the same bytes agree."""
        content = {"classes": self.classes, "shards": [[s.samples, s.sha256] for s in self.shards]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, directory: str | Path | Store) -> None:
        """Write `manifest.json`, with a checksum of itself; a reader sees either the old file or all of the new one."""
        content = asdict(self)
        content["checksum"] = _checksum(content)
        _store(directory).write(MANIFEST_NAME, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())

    @classmethod
    def load(cls, directory: str | Path | Store) -> Manifest:
        """Read the manifest of a split, from its directory, its address, or the manifest file itself.

        Raises:
            UserError: there is no manifest, it can't be read or understood, or its checksum disagrees.
        """
        store = _store(directory)
        path = store.at(MANIFEST_NAME)
        if isinstance(store, LocalStore) and not Path(path).is_file():
            raise UserError(_no_manifest(store))
        tries = 1 if isinstance(store, LocalStore) else DOWNLOADS
        for left in reversed(range(tries)):
            try:
                return cls._parsed(store.read(MANIFEST_NAME), path)
            except FileNotFoundError as error:
                raise UserError(_no_manifest(store)) from error
            except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                if left:
                    continue  # it may have been damaged on its way
                raise UserError(
                    f"{path}: damaged or edited by hand ({type(error).__name__}: {error}); "
                    "run the same `rookery prep` command again: it writes the manifest anew from its records"
                ) from error
        raise AssertionError("there is at least one try")

    @classmethod
    def _parsed(cls, data: bytes, path: str) -> Manifest:
        raw = json.loads(data)
        if raw.get("version") != MANIFEST_VERSION:
            raise UserError(
                f"{path}: manifest version {raw.get('version')!r}, this release reads {MANIFEST_VERSION}; "
                "prepare the shards again with `rookery prep`"
            )
        if raw.pop("checksum") != _checksum(raw):
            raise ValueError("its checksum disagrees")
        raw["shards"] = [Shard(**shard) for shard in raw["shards"]]
        raw["quarantine"] = [BadImage(**bad) for bad in raw["quarantine"]]
        manifest = cls(**raw)
        _check(manifest)
        return manifest


def _check(manifest: Manifest) -> None:
    """Refuse what no preparation writes: the checksum is no signature.

    Raises:
        ValueError: a value that can't be true, or a file outside the manifest's directory.
    """
    files = [shard.file for shard in manifest.shards]
    texts = (manifest.format, manifest.split, *manifest.classes, *files)
    texts += tuple(sha256 for shard in manifest.shards for sha256 in (shard.sha256, shard.index_sha256))
    if not isinstance(manifest.classes, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("a name that is no text")
    if manifest.format not in FORMATS:
        raise ValueError(f"format {manifest.format!r}, there is {' and '.join(FORMATS)}")
    if not isinstance(manifest.options, dict) or not isinstance(manifest.source, dict):
        raise ValueError("options or source without names")
    if len(set(files)) != len(files):
        raise ValueError("a shard that is listed twice")
    for shard in manifest.shards:
        if shard.file in ("", ".", "..") or set(shard.file) & set("/\\\0"):
            raise ValueError(f"shard {shard.file!r} is not the name of a file beside it")
        counts = _are_counts(shard.samples, shard.bytes)
        least = shard.samples * _MIN_TAR_BYTES if counts and manifest.format == "webdataset" else 0
        if not counts or not least <= shard.bytes < 2**63:
            raise ValueError(f"shard {shard.file} with {shard.samples!r} samples in {shard.bytes!r} bytes")
    tokens = manifest.token_labels
    if tokens is not None:
        counts = len(tokens.shape) == 4 and _are_counts(*tokens.shape, tokens.bytes)
        if not counts or not math.prod(tokens.shape) * np.dtype(tokens.dtype).itemsize < tokens.bytes < MAX_BYTES:
            raise ValueError(f"label maps of shape {tokens.shape} in {tokens.bytes!r} bytes")


def _are_counts(*values: Any) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)


def token_labels_offset(offset: int, size: int) -> int:
    """Byte of the shard at which a sample's label map starts, given the range of its image.

    Between the two stand the header and the one block of the label, and the map's own header.
    """
    return offset + -(-size // TAR_BLOCK) * TAR_BLOCK + 3 * TAR_BLOCK


class BadIndex(UserError):
    """The index of a shard can't be used; `reason` says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path}: {reason}; run `rookery verify` on the directory, and `rookery prep` again to rebuild what is "
            "damaged"
        )
        self.reason = reason


def load_index(directory: str | Path, shard: Shard, file: Path | None = None) -> np.ndarray:
    """Memory-map the index of one shard: shape (samples,), dtype `INDEX_DTYPE`.

    Args:
        file: a copy of the index to read instead.

    Raises:
        BadIndex: it is missing, damaged, or does not have `shard.samples` rows.
    """
    path = file or Path(directory) / shard.index_file
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("not a regular file")
        index = map_npy(path)
    except FileNotFoundError as error:
        raise BadIndex(path, f"the index of {shard.file} is missing") from error
    except (OSError, ValueError) as error:
        raise BadIndex(path, f"unreadable index ({error})") from error
    if index.dtype != INDEX_DTYPE or index.shape != (shard.samples,):
        raise BadIndex(
            path,
            f"index of shape {index.shape} and type {index.dtype}, "
            f"the manifest says ({shard.samples},) and {INDEX_DTYPE}",
        )
    return index


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _store(directory: str | Path | Store) -> Store:
    if not isinstance(directory, str | Path):
        return directory
    path = local_path(directory) if not is_remote(directory) else None
    if path is not None:
        return LocalStore(path.parent if path.name == MANIFEST_NAME else path)
    return open_store(str(directory).removesuffix(f"/{MANIFEST_NAME}"))


def _no_manifest(store: Store) -> str:
    path, splits = store.at(MANIFEST_NAME), []
    with suppress(OSError, UserError):
        splits = [folder for folder in store.folders() if MANIFEST_NAME in store.below(folder).sizes()]
    if splits:
        return f"{path}: no such manifest, but the directory holds the splits {', '.join(splits)}; name one of them"
    return f"{path}: no such manifest; make the shards first with `rookery prep SOURCE OUT`"
