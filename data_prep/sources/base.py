"""What every source of raw images offers: its splits, and for each a listing and a reader."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data_prep.errors import UserError
from data_prep.manifest import KEY_BYTES, BadImage

SPLIT_NAMES = ("train", "val", "validation", "valid", "test")


class Item(NamedTuple):
    """One image to be read.

    Attributes:
        name: where it stands in the source: a path, `tar!member`, `parquet#row`.
        key: its sample key.
        label: position of its class in the class list.
        at: the numbers its reader finds it by.
        stem: its file name without extension, empty where the source has no file names.
    """

    name: str
    key: str
    label: int
    at: tuple[int, ...]
    stem: str = ""


class Reader(Protocol):
    """Reads images of one split in a worker process: small when pickled, opened on first use."""

    def read(self, items: Sequence[Item]) -> Iterator[bytes]:
        """The encoded bytes of each item, in the order of `items`."""
        ...


@dataclass
class Listing:
    """Every image of one split, in the order of the source; the columns have one entry per image.

    Attributes:
        classes: class names, in label order.
        names: where each image stands in the source.
        labels: (n,) integers.
        sizes: (n,) bytes of each image, exactly or about; shards are planned by it.
        at: (n, k) integers by which `reader` finds an image.
        reader: reads the images.
        stems: file name without extension of each image, where the source has file names.
        blocks: (n,) number of the block that has to be read as a whole to get at an image; None: images stand alone.
        rejected: what the source holds that can't be listed as an image.
        content: hash of whatever the columns don't show of the source's contents.
        doubts: what looks as if another source was meant, for a line of warning each.
    """

    classes: list[str]
    names: list[str]
    labels: np.ndarray
    sizes: np.ndarray
    at: np.ndarray
    reader: Reader
    stems: list[str] | None = None
    blocks: np.ndarray | None = None
    rejected: list[BadImage] = field(default_factory=list)
    content: str = ""
    doubts: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self) -> str:
        """Hash of the class names and of every image's name, label and size."""
        digest = hashlib.sha256(self.content.encode())
        for texts in (self.classes, self.names, [f"{bad.source}\0{bad.reason}" for bad in self.rejected]):
            digest.update(f"{len(texts)}\n".encode())
            digest.update("\0".join(texts).encode("utf-8", "surrogateescape"))
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(self.sizes, dtype="<i8").tobytes())
        return digest.hexdigest()

    def items(self, positions: np.ndarray) -> list[Item]:
        """The images at these positions of the listing."""
        return [
            Item(
                self.names[i],
                sample_key(i, self.stems[i] if self.stems else ""),
                int(self.labels[i]),
                tuple(self.at[i].tolist()),
                self.stems[i] if self.stems else "",
            )
            for i in positions.tolist()
        ]


class Source(Protocol):
    """A place that holds raw images.

    Attributes:
        kind: its kind, as `--kind` takes it.
        name: its name in the manifest.
        path: where it lies.
        unnamed: it holds one split and doesn't say which, so the user may name it.
    """

    kind: str
    name: str
    path: Path
    unnamed: bool

    def splits(self) -> list[str]:
        """The splits it offers."""
        ...

    def listing(self, split: str) -> Listing:
        """Every image of one of them.

        Raises:
            UserError: the split can't be read or has no labels.
        """
        ...


def sample_key(position: int, stem: str) -> str:
    """Key of a sample: its position in the source, then its file name as far as it is safe and fits.

    Unique by the position, free of dots (WebDataset ends a key at the first dot) and at most `KEY_BYTES` long.
    """
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", stem)
    return f"{position:08d}_{safe}"[:KEY_BYTES] if safe else f"{position:08d}"


def hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: hidden, or what macOS puts into its archives."""
    return name.startswith(".") or name == "__MACOSX"


@contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Turn a failure of the operating system to read the source into a message for the user."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot read {error.filename or what}: {reason}; check that it is there, whole and readable for you"
        ) from error
