"""CIFAR-10 and CIFAR-100, as the python or the binary archive (tar.gz) or extracted; pixels become lossless PNG.

Layouts after the dataset's own page: python batches are pickled dicts with `data` (n, 3072), `filenames` and `labels`
(CIFAR-100: `fine_labels`, `coarse_labels`); binary records are 1 label byte (CIFAR-100: coarse, fine) and 3,072 pixel
bytes. Pixels are channel-first, 3 x 32 x 32.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.images import encode_png
from data_prep.options import PrepOptions
from data_prep.sources.archive import first_name, read_files, read_whole
from data_prep.sources.base import Item, Listing, reading

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """One of the four archives: which files hold which split, and which the class names."""

    files: dict[str, tuple[str, ...]]
    meta: str
    fine: bool
    binary: bool

    def all_files(self) -> set[str]:
        return {self.meta, *(name for names in self.files.values() for name in names)}


_TEN = [f"data_batch_{number}" for number in range(1, 6)]
LAYOUTS = {
    "cifar-10-batches-py": Layout({"train": tuple(_TEN), "test": ("test_batch",)}, "batches.meta", False, False),
    "cifar-10-batches-bin": Layout(
        {"train": tuple(f"{name}.bin" for name in _TEN), "test": ("test_batch.bin",)}, "batches.meta.txt", False, True
    ),
    "cifar-100-python": Layout({"train": ("train",), "test": ("test",)}, "meta", True, False),
    "cifar-100-binary": Layout({"train": ("train.bin",), "test": ("test.bin",)}, "fine_label_names.txt", True, True),
}


class CifarSource:
    """One of the archives, its extracted folder, or the folder that contains that folder."""

    kind = "cifar"
    unnamed = False

    def __init__(self, path: Path, options: PrepOptions) -> None:
        found = _find(path)
        if found is None:
            raise UserError(f"{path}: not a CIFAR archive; those understood hold {', '.join(LAYOUTS)}")
        self.path, name = found
        self.name = path.resolve().name
        self._layout = LAYOUTS[name]
        self._coarse = options.coarse_labels
        if self._coarse and not self._layout.fine:
            raise UserError(f"{path}: CIFAR-10 has no coarse labels; leave --coarse-labels out")

    @classmethod
    def matches(cls, path: Path) -> bool:
        return _find(path) is not None

    def splits(self) -> list[str]:
        return list(self._layout.files)

    def listing(self, split: str) -> Listing:
        names = self._layout.files[split]
        meta = self._layout.meta.replace("fine", "coarse") if self._coarse else self._layout.meta
        files = _load(self.path, {*names, meta})
        classes = self._classes(files[meta])
        batches = [_parse(self.path, name, files[name], self._layout, self._coarse) for name in names]
        labels = np.concatenate([batch.labels for batch in batches])
        wrong = labels[(labels < 0) | (labels >= len(classes))]
        if len(wrong):
            raise UserError(f"{self.path}: label {wrong[0]} in {split}, but there are {len(classes)} classes")
        content = hashlib.sha256()
        for batch in batches:
            content.update(batch.pixels.tobytes())
        stems = [stem for batch in batches for stem in batch.stems]
        rows = np.arange(len(labels))
        return Listing(
            classes,
            [f"{name}#{row}" for name, batch in zip(names, batches, strict=True) for row in range(len(batch.labels))],
            labels,
            np.full(len(labels), PIXELS),
            rows[:, None],
            CifarReader(self.path, names, self._layout),
            stems=stems or None,
            content=content.hexdigest(),
        )

    def _classes(self, meta: bytes) -> list[str]:
        try:
            if self._layout.binary:
                return meta.decode().split()
            table = _unpickle(self.path, meta)
            kind = (
                ("coarse_label_names" if self._coarse else "fine_label_names") if self._layout.fine else "label_names"
            )
            return [name.decode() for name in table[kind.encode()]]
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path}: no class names in {self._layout.meta} ({error!r}); fetch it again"
            ) from error


class CifarReader:
    """Encodes rows of one split as PNG; `at` is (row,). A worker holds the pixels of the split."""

    def __init__(self, path: Path, names: Sequence[str], layout: Layout) -> None:
        self.path = path
        self.names = names
        self.layout = layout

    @cached_property
    def _pixels(self) -> np.ndarray:
        files = _load(self.path, set(self.names))
        batches = [_parse(self.path, name, files[name], self.layout, False).pixels for name in self.names]
        return np.concatenate(batches).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)

    def read(self, items: Sequence[Item]) -> Iterator[bytes]:
        for item in items:
            yield encode_png(self._pixels[item.at[0]])


@dataclass(frozen=True)
class _Batch:
    pixels: np.ndarray
    labels: np.ndarray
    stems: list[str]


def _parse(path: Path, name: str, data: bytes, layout: Layout, coarse: bool) -> _Batch:
    if layout.binary:
        width = PIXELS + (2 if layout.fine else 1)
        if not data or len(data) % width:
            raise UserError(f"{path}: {name} has {len(data)} bytes, not a whole number of {width}-byte records")
        records = np.frombuffer(data, dtype=np.uint8).reshape(-1, width)
        labels = records[:, 0 if coarse or not layout.fine else 1].astype(np.int64)
        return _Batch(records[:, -PIXELS:], labels, [])
    table = _unpickle(path, data)
    key = (b"coarse_labels" if coarse else b"fine_labels") if layout.fine else b"labels"
    try:
        pixels = np.asarray(table[b"data"])
        labels = np.asarray(table[key], dtype=object).astype(np.int64)
        stems = [PurePosixPath(file.decode()).stem for file in table.get(b"filenames", [])]
        if pixels.dtype != np.uint8 or labels.ndim != 1 or labels.tolist() != list(table[key]):
            raise ValueError(f"pixels of type {pixels.dtype}, or labels that are no numbers")
        pixels = pixels.reshape(-1, PIXELS)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: {name} is not a CIFAR batch ({error}); fetch it again") from error
    if len(labels) != len(pixels) or (stems and len(stems) != len(pixels)):
        raise UserError(f"{path}: {name} has {len(pixels)} images, but {len(labels)} labels and {len(stems)} names")
    return _Batch(pixels, labels, stems)


class _ArrayType:
    """Stands for `numpy.ndarray` in a pickle, which could else be made to allocate one of any size."""


def _empty_array(kind: type, *_: object) -> np.ndarray:
    """What a pickle of an array begins with; its shape, type and bytes follow as its state."""
    if kind is not _ArrayType:
        raise pickle.UnpicklingError("not an array")
    return np.empty(0, np.uint8)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding}")
    return text.encode(encoding)


def _no_bytes() -> bytes:
    """Stands for `bytes` in a pickle, which could else be made to allocate any number of them."""
    return b""


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and bytes, nothing else: a pickle from the network may otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        if (module, name) == ("numpy", "ndarray"):
            return _ArrayType
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return _latin1
        if (module, name) in (("__builtin__", "bytes"), ("builtins", "bytes")):  # and none of them: bytes()
            return _no_bytes
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickle(path: Path, data: bytes) -> dict[bytes, Any]:
    try:
        return dict(_ArrayUnpickler(io.BytesIO(data), encoding="bytes").load())
    except Exception as error:  # a damaged pickle calls anything with anything, and so raises any type
        raise UserError(f"{path}: damaged batch file ({type(error).__name__}: {error}); fetch it again") from error


def _find(path: Path) -> tuple[Path, str] | None:
    """The archive or folder that holds the batches, and the name of its layout."""
    with reading(path):
        if path.is_dir():
            for folder in (path, *(path / name for name in LAYOUTS)):
                for name, layout in LAYOUTS.items():
                    if all((folder / file).is_file() for file in layout.all_files()):
                        return folder, name
            return None
    top = next(iter(PurePosixPath(first_name(path)).parts), "")
    return (path, top) if top in LAYOUTS else None


def _load(path: Path, names: set[str]) -> dict[str, bytes]:
    """The named files of an archive or folder."""
    if path.is_dir():
        return {name: read_whole(path / name) for name in names}
    found = read_files(path, names)
    missing = sorted(names - found.keys())
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing in it; fetch it again")
    return found
