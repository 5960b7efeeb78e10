"""CIFAR archives that are damaged, or made to do harm."""

from __future__ import annotations

import codecs
import gzip
import os
import pickle
import tarfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.data_prep.fuzz_folders import Make, sparse
from tests.data_prep.fuzz_ilsvrc import header, packed_zeros, with_sum
from tests.data_prep.helpers import make_tar, tar_bytes
from tests.data_prep.test_cifar import files as cifar_files
from tests.fuzzing import damaged, generator


def _cifar(layout: str, changes: Mapping[str, bytes | None]) -> Make:
    """An archive with some files changed, or left out."""

    def make(top: Path) -> Path:
        made = cifar_files(layout)
        for name, data in changes.items():
            made.pop(f"{layout}/{name}", None)
            if data is not None:
                made[f"{layout}/{name}"] = data
        return make_tar(top / "cifar.tar.gz", made, "w:gz")

    return make


def _cifar_damaged(layout: str, file: str, how: str, top: Path) -> Path:
    made = cifar_files(layout)
    name = f"{layout}/{file}"
    made[name] = damaged(made[name], how.split()[0], generator(f"{name} {how}"))
    return make_tar(top / "cifar.tar.gz", made, "w:gz")


def _cifar_packed(how: str, top: Path) -> Path:
    path = make_tar(top / "cifar.tar.gz", cifar_files("cifar-10-batches-py"), "w:gz")
    path.write_bytes(damaged(path.read_bytes(), how.split()[0], generator(f"packed {how}")))
    return path


def _table(**changes: Any) -> bytes:
    table: dict[bytes, Any] = {
        b"data": np.zeros((4, 3072), np.uint8),
        b"labels": [0, 1, 2, 3],
        b"filenames": [b"a.png", b"b.png", b"c.png", b"d.png"],
    }
    for key, value in changes.items():
        table.pop(key.encode(), None)
        if value is not None:
            table[key.encode()] = value
    return pickle.dumps(table, protocol=2)


class _Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def _huge_array() -> bytes:
    """A pickle that has NumPy make an array of 10^13 bytes."""
    whole = pickle.dumps(np.zeros(3, np.uint8), protocol=2)
    return whole.replace(b"K\x00\x85", b"\x8a\x06\x00\xa0\x72\x4e\x18\x09\x85", 1)


PY, BIN, CIFAR100 = "cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python"
CIFAR: dict[str, Make] = {
    **{f"packed {how}": partial(_cifar_packed, how) for how in ("cut", "flipped", "flipped again", "spliced")},
    **{
        f"batch {how}": partial(_cifar_damaged, PY, "data_batch_2", how)
        for how in ("cut", "flipped", "flipped again", "flipped once more", "zeroed", "spliced")
    },
    **{f"meta {how}": partial(_cifar_damaged, PY, "batches.meta", how) for how in ("cut", "flipped", "zeroed")},
    **{f"records {how}": partial(_cifar_damaged, BIN, "data_batch_1.bin", how) for how in ("cut", "spliced")},
    "batch is missing": _cifar(PY, {"data_batch_3": None}),
    "batch is empty": _cifar(PY, {"data_batch_3": b""}),
    "batch is a list": _cifar(PY, {"data_batch_1": pickle.dumps([1, 2], 2)}),
    "batch runs a program": _cifar(PY, {"data_batch_1": pickle.dumps(_Call(os.system, "touch evil"), 2)}),
    "batch evaluates code": _cifar(PY, {"data_batch_1": pickle.dumps(_Call(eval, "open('evil', 'w')"), 2)}),
    "batch asks for 10 TB": _cifar(PY, {"data_batch_1": _huge_array()}),
    "batch asks for 10 TB by its type": _cifar(PY, {"data_batch_1": pickle.dumps(_Call(np.ndarray, (10**13,)), 2)}),
    "batch of odd text": _cifar(PY, {"data_batch_1": pickle.dumps(_Call(codecs.encode, "abc", "rot13"), 2)}),
    "label 10 of 10": _cifar(PY, {"data_batch_1": _table(labels=[0, 1, 2, 10])}),
    "label below nothing": _cifar(PY, {"data_batch_1": _table(labels=[0, 1, 2, -1])}),
    "label of 2^70": _cifar(PY, {"data_batch_1": _table(labels=[0, 1, 2, 2**70])}),
    "labels as words": _cifar(PY, {"data_batch_1": _table(labels=["a", "b", "c", "d"])}),
    "labels between numbers": _cifar(PY, {"data_batch_1": _table(labels=[0.5, 1.0, 2.0, 3.0])}),
    "labels in lists": _cifar(PY, {"data_batch_1": _table(labels=[[0], [1], [2], [3]])}),
    "label that is none": _cifar(PY, {"data_batch_1": _table(labels=[0, 1, 2, None])}),
    "fewer labels": _cifar(PY, {"data_batch_1": _table(labels=[0, 1])}),
    "no labels": _cifar(PY, {"data_batch_1": _table(labels=None)}),
    "no pixels": _cifar(PY, {"data_batch_1": _table(data=None)}),
    "no rows": _cifar(CIFAR100, {"train": _table(data=np.zeros((0, 3072), np.uint8), fine_labels=[], filenames=None)}),
    "pixels of another size": _cifar(PY, {"data_batch_1": _table(data=np.zeros((4, 3000), np.uint8))}),
    "pixels as floats": _cifar(PY, {"data_batch_1": _table(data=np.zeros((4, 3072)))}),
    "pixels as text": _cifar(PY, {"data_batch_1": _table(data=b"pixels")}),
    "names as numbers": _cifar(PY, {"data_batch_1": _table(filenames=[1, 2, 3, 4])}),
    "names that lead up": _cifar(PY, {"data_batch_1": _table(filenames=[b"../../../evil.png"] * 4)}),
    "names that are not UTF-8": _cifar(PY, {"data_batch_1": _table(filenames=[b"\xff\xfe"] * 4)}),
    "no class names": _cifar(PY, {"batches.meta": pickle.dumps({b"num_vis": 3072}, 2)}),
    "class names as numbers": _cifar(PY, {"batches.meta": pickle.dumps({b"label_names": [1, 2, 3]}, 2)}),
    "fewer class names": _cifar(PY, {"batches.meta": pickle.dumps({b"label_names": [b"a", b"b"]}, 2)}),
    "class names that are not UTF-8": _cifar(BIN, {"batches.meta.txt": b"\xff\xfe\n" * 10}),
    "records of no length": _cifar(BIN, {"data_batch_1.bin": b""}),
    "record with label 255": _cifar(BIN, {"data_batch_1.bin": b"\xff" + bytes(3072)}),
}  # fmt: skip


def _large(top: Path) -> Path:
    """A batch of 300 MiB, which is packed to 300 kB."""
    block = header(f"{PY}/data_batch_1", size=300 * 2**20)
    (top / "cifar.tar.gz").write_bytes(gzip.compress(block) + packed_zeros(300) + gzip.compress(bytes(1024)))
    return top / "cifar.tar.gz"


def _cifar_sparse(top: Path) -> Path:
    """A batch of 1 TB that takes no room: a sparse member."""
    block = header(f"{PY}/data_batch_1", tarfile.GNUTYPE_SPARSE)
    block[386:482] = (b"%011o\0" % 0) * 8
    block[483:495] = b"\x80" + (10**12).to_bytes(11, "big")
    rest = {name: data for name, data in cifar_files(PY).items() if not name.endswith("data_batch_1")}
    (top / "cifar.tar.gz").write_bytes(gzip.compress(with_sum(block) + tar_bytes(rest)))
    return top / "cifar.tar.gz"


def _cifar_folder(top: Path) -> Path:
    """An extracted archive, one of whose files is 100 GB."""
    for name, data in cifar_files(PY).items():
        (top / name).parent.mkdir(exist_ok=True)
        (top / name).write_bytes(data)
    sparse(top / PY / "data_batch_2", 10**11)
    return top / PY


CIFAR |= {
    "batch of 300 MiB": _large,
    "sparse batch of 1 TB": _cifar_sparse,
    "folder with a file of 100 GB": _cifar_folder,
}
