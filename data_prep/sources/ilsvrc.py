"""The official ILSVRC2012 archives, read in place.

The train tar is a tar of 1,000 tars, one per class and named by its WordNet id. The val tar is flat; its labels stand
in the development kit as ILSVRC2012_IDs, one line per image, which `data/meta.mat` maps to WordNet ids. Labels of both
splits are positions in the *sorted* WordNet ids, the order that every ImageNet classifier uses.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
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
_DEVKIT_BYTES = 16 * 2**20  # it has a thousand classes and 50,000 labels
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
        others: list[str] = []
        found = sorted(members(descriptor, others=others), key=lambda member: member.name)
        numbers = [_val_number(path, member.name) for member in found]
        if sorted(numbers) != list(range(1, len(truth) + 1)):
            raise UserError(
                f"{path}: {len(numbers)} images, but {self._devkit} holds {len(truth)} labels; "
                "the two must come from the same release"
            )
        labels = np.array([truth[number - 1] for number in numbers], dtype=np.int64)
        return _listing(path, classes, [member.name for member in found], found, labels, _not_files(others))


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
    truth_file, meta_file = _devkit_files(path)
    try:
        # In a process of its own: a damaged file can crash SciPy's reader rather than raise.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            wnid_of = process.submit(_read_classes, meta_file).result()
        classes = sorted(wnid_of.values())
        label_of = {number: classes.index(wnid) for number, wnid in wnid_of.items()}
        return classes, [label_of[int(line)] for line in truth_file.split()]
    except Exception as error:  # SciPy raises nearly every type on a damaged file
        raise UserError(f"{path}: not a readable development kit ({type(error).__name__}: {error})") from error


def _read_classes(meta: bytes) -> dict[int, str]:
    """ILSVRC2012_ID and WordNet id of the synsets without children, from `meta.mat`."""
    from scipy.io import loadmat

    synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
    columns = (synsets[name] for name in ("ILSVRC2012_ID", "WNID", "num_children"))
    return {int(number): str(wnid) for number, wnid, children in zip(*columns, strict=True) if int(children) == 0}


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
    large = [name for name in wanted if len(found[name]) > _DEVKIT_BYTES]
    if large:
        raise UserError(f"{path}: {len(found[large[0]])} bytes are too many for data/{large[0]}; fetch it again")
    return found[wanted[0]], found[wanted[1]]


def _list_train(path: Path, descriptor: int) -> Listing:
    others: list[str] = []
    tars, rejected = [], []
    for member in members(descriptor, others=others):
        if member.name.endswith(".tar"):
            tars.append(member)
        else:
            rejected.append(BadImage(f"{path.name}!{member.name}", "not the tar of a class", "dropped"))
    rejected += _not_files([f"{path.name}!{name}" for name in others])
    tars.sort(key=lambda tar: tar.name)
    classes = [PurePosixPath(tar.name).stem for tar in tars]
    twice = [name for name, number in Counter(classes).items() if number > 1]
    if twice:
        raise TarError(f"{twice[0]}.tar is in it twice")

    def scan(tar: Member) -> tuple[list[Member], list[str]]:
        others: list[str] = []
        try:
            return sorted(members(descriptor, tar.offset, tar.offset + tar.size, others)), others
        except TarError as error:
            raise TarError(f"{tar.name}: {error}") from error

    with ThreadPoolExecutor(SCAN_THREADS) as threads:
        images, not_files = zip(*threads.map(scan, tars), strict=True) if tars else ((), ())
    for tar, others in zip(tars, not_files, strict=True):
        rejected += _not_files([f"{tar.name}!{name}" for name in others])
    names = [f"{tar.name}!{image.name}" for tar, inside in zip(tars, images, strict=True) for image in inside]
    labels = np.repeat(np.arange(len(tars)), [len(inside) for inside in images])
    return _listing(path, classes, names, [image for inside in images for image in inside], labels, rejected)


def _not_files(names: Sequence[str]) -> list[BadImage]:
    return [BadImage(name, "a link, device or pipe, not a file", "dropped") for name in sorted(names)]


def _listing(
    path: Path, classes: list[str], names: list[str], found: list[Member], labels: np.ndarray, rejected: list[BadImage]
) -> Listing:
    at = np.array([(member.offset, member.size) for member in found], dtype=np.int64).reshape(-1, 2)
    stems = [PurePosixPath(member.name).stem for member in found]
    large = np.flatnonzero(at[:, 1] > MAX_BYTES).tolist()
    rejected = rejected + [BadImage(names[i], absurd_bytes(at[i, 1]), "dropped") for i in large]
    small = np.delete(np.arange(len(found)), large)
    names, stems = [names[i] for i in small], [stems[i] for i in small]
    at, labels = at[small], labels[small]
    return Listing(classes, names, labels, at[:, 1], at, TarReader(str(path)), stems=stems, rejected=rejected)


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
