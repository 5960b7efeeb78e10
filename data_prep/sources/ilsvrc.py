"""The official ILSVRC2012 archives, read in place.

The train tar is a tar of 1,000 tars, one per class and named by its WordNet id. The val tar is flat; its labels stand
in the development kit as ILSVRC2012_IDs, one line per image, which `data/meta.mat` maps to WordNet ids. Labels of both
splits are positions in the *sorted* WordNet ids, the order that every ImageNet classifier uses.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np

from data_prep.errors import UserError
from data_prep.images import absurd_bytes
from data_prep.manifest import MAX_BYTES, BadImage
from data_prep.options import PrepOptions
from data_prep.sources.archive import read_files, read_whole
from data_prep.sources.base import Item, Listing, reading
from data_prep.tarscan import Member, TarError, members

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
SCAN_THREADS = 16  # headers of the class tars are read one by one; on network storage the waiting adds up


class IlsvrcSource:
    """The train tar, the val tar, or a folder with one or both; the devkit is looked for beside them."""

    kind = "ilsvrc"
    unnamed = False

    def __init__(self, path: Path, options: PrepOptions) -> None:
        self.path = path
        self.name = path.resolve().name
        if path.is_dir():
            found = {"train": path / TRAIN_TAR, "val": path / VAL_TAR}
            self._tars = {split: tar for split, tar in found.items() if tar.is_file()}
            folder = path
        else:
            self._tars = {_split_of(path) or "train": path}
            folder = path.parent
        if not self._tars:
            raise UserError(f"{path}: neither {TRAIN_TAR} nor {VAL_TAR} in it")
        beside = [folder / f"{DEVKIT}.tar.gz", folder / DEVKIT]
        self._devkit = options.devkit or next((kit for kit in beside if kit.exists()), None)

    @classmethod
    def matches(cls, path: Path) -> bool:
        if path.is_dir():
            return (path / TRAIN_TAR).is_file() or (path / VAL_TAR).is_file()
        return _split_of(path) is not None

    def splits(self) -> list[str]:
        return list(self._tars)

    def listing(self, split: str) -> Listing:
        path = self._tars[split]
        with reading(path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                return _list_train(path, descriptor) if split == "train" else self._list_val(path, descriptor)
            except TarError as error:
                raise UserError(f"{path}: {error}; fetch the archive again") from error
            finally:
                os.close(descriptor)

    def _list_val(self, path: Path, descriptor: int) -> Listing:
        if self._devkit is None:
            raise UserError(
                f"{path}: the labels of the validation images stand in the development kit; "
                f"name it with --devkit {DEVKIT}.tar.gz"
            )
        classes, truth = read_devkit(self._devkit)
        found = sorted(members(descriptor), key=lambda member: member.name)
        numbers = [_val_number(path, member.name) for member in found]
        if sorted(numbers) != list(range(1, len(truth) + 1)):
            raise UserError(
                f"{path}: {len(numbers)} images, but {self._devkit} holds {len(truth)} labels; "
                "the two must come from the same release"
            )
        labels = np.array([truth[number - 1] for number in numbers], dtype=np.int64)
        return _listing(path, classes, [member.name for member in found], found, labels)


class TarReader:
    """Reads byte ranges of one file; `at` is (offset, size)."""

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self, items: Sequence[Item]) -> Iterator[bytes]:
        with reading(self.path), open(self.path, "rb", buffering=0) as file:
            for item in items:
                offset, size = item.at
                data = os.pread(file.fileno(), size, offset)
                if len(data) != size:
                    raise UserError(f"{self.path}: {item.name} is cut short; the archive changed while it was read")
                yield data


def read_devkit(path: Path) -> tuple[list[str], list[int]]:
    """Sorted WordNet ids of the classes, and the label of validation image 1, 2, ... among them.

    `path` is the devkit's archive or its extracted folder. Its `meta.mat` numbers the synsets; those without children
    are the classes.
    """
    from scipy.io import loadmat

    truth_file, meta_file = _devkit_files(path)
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta_file), squeeze_me=True)["synsets"])
        wnid_of = {
            int(number): str(wnid)
            for number, wnid, children in zip(
                synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["num_children"], strict=True
            )
            if int(children) == 0
        }
        classes = sorted(wnid_of.values())
        label_of = {number: classes.index(wnid) for number, wnid in wnid_of.items()}
        return classes, [label_of[int(line)] for line in truth_file.split()]
    except Exception as error:  # SciPy raises nearly every type on a damaged file
        raise UserError(f"{path}: not a readable development kit ({type(error).__name__}: {error})") from error


def _devkit_files(path: Path) -> tuple[bytes, bytes]:
    wanted = ["ILSVRC2012_validation_ground_truth.txt", "meta.mat"]
    with reading(path):
        if path.is_dir():
            found = {file.name: read_whole(file) for file in path.glob("**/data/*") if file.name in wanted}
        else:
            found = read_files(path, set(wanted))
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(f"{path}: no data/{missing[0]} in it; it should be {DEVKIT}.tar.gz or its extracted folder")
    return found[wanted[0]], found[wanted[1]]


def _list_train(path: Path, descriptor: int) -> Listing:
    tars, rejected = [], []
    for member in members(descriptor):
        if member.name.endswith(".tar"):
            tars.append(member)
        else:
            rejected.append(BadImage(f"{path.name}!{member.name}", "not the tar of a class", "dropped"))
    tars.sort(key=lambda tar: tar.name)
    classes = [PurePosixPath(tar.name).stem for tar in tars]
    twice = [name for name, number in Counter(classes).items() if number > 1]
    if twice:
        raise TarError(f"{twice[0]}.tar is in it twice")

    def scan(tar: Member) -> list[Member]:
        try:
            return sorted(members(descriptor, tar.offset, tar.offset + tar.size))
        except TarError as error:
            raise TarError(f"{tar.name}: {error}") from error

    with ThreadPoolExecutor(SCAN_THREADS) as threads:
        images = list(threads.map(scan, tars))
    names = [f"{tar.name}!{image.name}" for tar, inside in zip(tars, images, strict=True) for image in inside]
    labels = np.repeat(np.arange(len(tars)), [len(inside) for inside in images])
    listing = _listing(path, classes, names, [image for inside in images for image in inside], labels)
    listing.rejected += rejected
    return listing


def _listing(path: Path, classes: list[str], names: list[str], found: list[Member], labels: np.ndarray) -> Listing:
    at = np.array([(member.offset, member.size) for member in found], dtype=np.int64).reshape(-1, 2)
    stems = [PurePosixPath(member.name).stem for member in found]
    small = at[:, 1] <= MAX_BYTES
    rejected = [BadImage(names[i], absurd_bytes(at[i, 1]), "dropped") for i in np.flatnonzero(~small)]
    keep = np.flatnonzero(small).tolist()
    names, stems = [names[i] for i in keep], [stems[i] for i in keep]
    return Listing(classes, names, labels[small], at[small, 1], at[small], TarReader(str(path)), stems, None, rejected)


def _split_of(path: Path) -> str | None:
    """`train` or `val` by the names of the first members of a tar, None if it is neither."""
    with reading(path), open(path, "rb") as file:
        try:
            for member in islice(members(file.fileno()), 20):
                name = PurePosixPath(member.name).name
                if re.fullmatch(r"n\d{8}\.tar", name):
                    return "train"
                if re.fullmatch(r"ILSVRC2012_val_\d{8}\.JPEG", name):
                    return "val"
        except TarError:
            pass
    return None


def _val_number(path: Path, name: str) -> int:
    match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", PurePosixPath(name).name)
    if match is None:
        raise UserError(f"{path}: {name} is not named like a validation image (ILSVRC2012_val_00000001.JPEG)")
    return int(match[1])
