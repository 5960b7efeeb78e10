"""Class folders: `root/<class>/*`, or `root/{train,val,test}/<class>/*`."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from data_prep.errors import UserError
from data_prep.images import absurd_bytes
from data_prep.manifest import MAX_BYTES, BadImage
from data_prep.options import PrepOptions
from data_prep.sources.base import SPLIT_NAMES, Item, Listing, hidden, reading
from data_prep.wording import printable

SHOWN = 5
SPLIT_WORDS = {*SPLIT_NAMES, "training", "testing", "dev", "eval"}
"""What folders of splits are called, in lower case: more than what is taken for one."""


class FolderSource:
    """Every regular file below a class folder is an image of that class, except hidden ones.

    Classes are sorted by name, over all splits together, so that the labels of the splits agree.
    """

    kind = "folder"

    def __init__(self, path: Path, options: PrepOptions) -> None:
        self.path = path
        self.name = path.resolve().name
        with reading(path):
            folders = _folders(path)
            splits = [folder for folder in folders if folder in SPLIT_NAMES]
            holds_splits = splits == folders or any(_folders(path / split) for split in splits)
        self.unnamed = not holds_splits
        self._roots = {split: path / split for split in splits} if holds_splits else {"train": path}

    @classmethod
    def matches(cls, path: Path) -> bool:
        with reading(path):
            return path.is_dir() and bool(_folders(path))

    def splits(self) -> list[str]:
        return sorted(self._roots, key=SPLIT_NAMES.index)

    def listing(self, split: str) -> Listing:
        root = self._roots[split]
        with reading(root):
            classes = sorted({name for folder in self._roots.values() for name in _folders(folder)})
            own = _folders(root)
            if not own:
                raise UserError(f"{root}: no class folders in it; the layout is <class>/<images>")
            self._check_forms(classes)
            names, labels, sizes = [], [], []
            rejected: list[BadImage] = []
            label_of = {name: label for label, name in enumerate(classes)}
            for folder in own:
                for name, size in sorted(_files(root, folder, rejected)):
                    names.append(name)
                    labels.append(label_of[folder])
                    sizes.append(size)
        column = np.array(sizes, dtype=np.int64)
        return Listing(
            classes,
            names,
            np.array(labels, dtype=np.int64),
            column,
            column[:, None],
            FolderReader(str(root)),
            stems=[PurePosixPath(name).stem for name in names],
            rejected=sorted(rejected, key=lambda bad: bad.source),
            doubts=self._doubts(names),
        )

    def _doubts(self, names: list[str]) -> list[str]:
        """What looks like a folder too high up, or like splits under names that aren't known: labels would be wrong."""
        below: dict[str, set[str]] = {}  # of each class with images: the folders in it that they lie in, "" for none
        for name in names:
            parts = name.split("/", 2)
            below.setdefault(parts[0], set()).add(parts[1] if len(parts) > 2 else "")
        doubts = []
        inner = set().union(*below.values())
        splits = any(names and {name.lower() for name in names} <= SPLIT_WORDS for names in (set(below), inner))
        if inner and "" not in inner and (splits or len(below) == 1):
            folder = next(iter(below))
            doubts.append(
                f"all images of the class {printable(folder)} lie in folders in it, such as "
                f"{printable(f'{folder}/{min(below[folder])}')}; if the classes are these, name the folder that holds "
                f"them, and call folders of splits {', '.join(SPLIT_NAMES)}"
            )
        if left_out := [folder for folder in _folders(self.path) if not self.unnamed and folder not in self._roots]:
            doubts.append(
                f"left out, being no split ({', '.join(SPLIT_NAMES)}): {', '.join(map(printable, left_out[:SHOWN]))}"
                + (f" and {len(left_out) - SHOWN:,} more" if len(left_out) > SHOWN else "")
            )
        return doubts

    def _check_forms(self, classes: list[str]) -> None:
        """Refuse names that look the same: macOS writes an accent as a letter of its own, others don't."""
        forms: dict[str, str] = {}
        for name in classes:
            other = forms.setdefault(unicodedata.normalize("NFC", name), name)
            if other != name:
                places = [
                    f"{next(root for root in self._roots.values() if (root / one).is_dir())}{os.sep}{ascii(one)[1:-1]}"
                    for one in (other, name)
                ]
                raise UserError(
                    f"{places[0]} and {places[1]}: the same name {printable(name)} in two Unicode forms would be two "
                    "classes; give both folders one name"
                )


class FolderReader:
    """Reads the files of one split; `at` is (size,)."""

    def __init__(self, root: str) -> None:
        self.root = root

    def read(self, items: Sequence[Item]) -> Iterator[bytes]:
        for item in items:
            path = os.path.join(self.root, item.name)  # noqa: PTH118  (once per image: a Path costs more than the open)
            with reading(path), open(path, "rb") as file:
                data = file.read()
            if len(data) != item.at[0]:
                raise UserError(
                    f"{path}: {item.at[0]} bytes when the source was listed, {len(data)} now; "
                    "let the source rest while it is prepared, then run the same command again"
                )
            yield data


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not hidden(entry.name))


def _files(root: Path, folder: str, rejected: list[BadImage]) -> Iterator[tuple[str, int]]:
    """Path relative to `root` and size of every visible file below root/folder; `rejected` gets what can't be one.

    Links to folders are followed, but every folder is read once: links can make one hold itself.
    """
    waiting, seen = [folder], set()
    while waiting:
        folder = waiting.pop()
        status = (root / folder).stat()
        place = (status.st_dev, status.st_ino)
        if place in seen:
            rejected.append(BadImage(folder, "another name of a folder of this class", "dropped"))
            continue
        seen.add(place)
        with os.scandir(root / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = f"{folder}/{entry.name}"
                if hidden(entry.name):
                    continue
                if entry.is_dir():
                    waiting.append(name)
                    continue
                status = entry.stat()  # a dangling link fails here rather than vanish
                if not stat.S_ISREG(status.st_mode):  # a pipe or a device may have no end
                    rejected.append(BadImage(name, "not a regular file", "dropped"))
                elif status.st_size > MAX_BYTES:
                    rejected.append(BadImage(name, absurd_bytes(status.st_size), "dropped"))
                else:
                    yield name, status.st_size
