"""Splits that are damaged, or whose manifest vouches for what can't be."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.manifest import INDEX_DTYPE, MANIFEST_NAME, _checksum
from tests.fuzzing import damaged, generator

# Does something to the folder of a split.
Do = Callable[[Path], object]

TAR, INDEX = "train-000001.tar", "train-000001.idx.npy"


# --- bytes


def _damage(file: str, how: str, split: Path) -> None:
    path = split / file
    path.write_bytes(damaged(path.read_bytes(), how.split()[0], generator(f"{file} {how}")))


DAMAGED: dict[str, Do] = {
    f"{file}: {how} {number}": partial(_damage, file, f"{how} {number}")
    for file, ways in (
        (TAR, {"cut": 3, "flipped": 12, "zeroed": 4, "spliced": 2}),
        (INDEX, {"cut": 3, "flipped": 8, "zeroed": 3, "spliced": 2}),
        (MANIFEST_NAME, {"cut": 3, "flipped": 10, "zeroed": 2, "spliced": 3}),
    )
    for how, times in ways.items()
    for number in range(times)
}

# --- files that are something else


def _instead(file: str, make: Callable[[Path], object], split: Path) -> None:
    (split / file).unlink()
    make(split / file)


def _outside(split: Path) -> Path:
    return split.parent / "outside"


OTHERS: dict[str, Do] = {
    f"{file} {what}": partial(_instead, file, make)
    for file in (TAR, INDEX, MANIFEST_NAME)
    for what, make in (
        ("is missing", lambda path: None),
        ("is empty", Path.touch),
        ("is a folder", Path.mkdir),
        ("is a pipe", os.mkfifo),
        ("is zeros without end", lambda path: path.symlink_to("/dev/zero")),
        ("links to itself", lambda path: path.symlink_to(path.name)),
    )
}

# --- manifests with a right checksum


def _edited(change: Callable[[dict[str, Any]], object], split: Path) -> None:
    path = split / MANIFEST_NAME
    content = json.loads(path.read_bytes())
    del content["checksum"]
    change(content)
    content["checksum"] = _checksum(content)
    path.write_text(json.dumps(content))


def _shard(**values: Any) -> Do:
    return partial(_edited, lambda content: content["shards"][1].update(values))


def _top(**values: Any) -> Do:
    return partial(_edited, lambda content: content.update(values))


def _named_outside(name: str) -> Do:
    """The shard is where the name leads, whole, and the manifest names it there."""

    def do(split: Path) -> None:
        outside = _outside(split)
        for file in (TAR, INDEX):
            (outside / file).write_bytes((split / file).read_bytes())
        _shard(file=name.format(outside=outside))(split)

    return do


def _tokens(**values: Any) -> Do:
    described = {"maps": "maps", "shape": [2, 5, 18, 18], "dtype": "float16", "bytes": 6608} | values
    return partial(_edited, lambda content: content["options"].update(token_labels=described))


MANIFESTS: dict[str, Do] = {
    "shard above": _named_outside("../outside/" + TAR),
    "shard far above": _named_outside("../" * 20 + "outside/" + TAR),
    "shard of an absolute name": _named_outside("{outside}/" + TAR),
    "shard in a folder": _named_outside("folder/" + TAR),
    "shard with a backslash": _named_outside("..\\outside\\" + TAR),
    "shard named up": _shard(file=".."),
    "shard named here": _shard(file="."),
    "shard without a name": _shard(file=""),
    "shard with a zero in its name": _shard(file="train\0.tar"),
    "shard whose name is a number": _shard(file=7),
    "shard named as the manifest": _shard(file=MANIFEST_NAME),
    "shard twice": _shard(file="train-000000.tar"),
    "samples below nothing": _shard(samples=-1),
    "samples as text": _shard(samples="9"),
    "samples between numbers": _shard(samples=8.5),
    "samples true": _shard(samples=True),
    "samples missing": _shard(samples=None),
    "10^18 samples": _shard(samples=10**18),
    "10^30 samples": _shard(samples=10**30),
    "one sample more": _shard(samples=10),
    "no samples": _shard(samples=0),
    "bytes below nothing": _shard(bytes=-1),
    "10^18 bytes": _shard(bytes=10**18),
    "10^30 bytes and samples": _shard(bytes=10**30, samples=10**26),
    "bytes as a list": _shard(bytes=[1]),
    "another hash": _shard(sha256="0" * 64),
    "hash missing": _shard(sha256=None),
    "hash of the index as a number": _shard(index_sha256=7),
    "further field": _shard(more=1),
    "shards as text": _top(shards="train-000001.tar"),
    "shards as numbers": _top(shards=[1, 2]),
    "no shards": _top(shards=[]),
    "classes as text": _top(classes="abc"),
    "classes as numbers": _top(classes=[1, 2, 3]),
    "one class": _top(classes=["ant"]),
    "no classes": _top(classes=[]),
    "version 2": _top(version=2),
    "version as a list": _top(version=[1]),
    "options as a list": _top(options=[1]),
    "source as text": _top(source="source"),
    "quarantine as text": _top(quarantine="none"),
    "unknown format": _top(format="tfrecord"),
    "format as a number": _top(format=7),
    "split as a list": _top(split=["train"]),
    "label maps as a number": partial(_edited, lambda content: content["options"].update(token_labels=7)),
    "label maps without a shape": _tokens(shape=[]),
    "label maps of 10^6 x 10^6": _tokens(shape=[2, 5, 10**6, 10**6], bytes=10**13),
    "label maps of objects": _tokens(dtype="object"),
    "label maps that are not there": _tokens(),
    "list": lambda split: (split / MANIFEST_NAME).write_text("[1, 2]"),
    "100,000 brackets": lambda split: (split / MANIFEST_NAME).write_text("[" * 100_000),
    "number of 10,000 digits": lambda split: (split / MANIFEST_NAME).write_text('{"version": ' + "9" * 10_000 + "}"),
    "not UTF-8": lambda split: (split / MANIFEST_NAME).write_bytes(b'{"version": "\xff\xfe"}'),
    "in another coding": lambda split: (split / MANIFEST_NAME).write_text('{"version": 1}', "utf-16"),
}

# --- indexes and tars whose hashes the manifest knows


def _vouched(split: Path) -> None:
    tar, index = (split / file for file in (TAR, INDEX))
    _shard(
        bytes=tar.stat().st_size,
        sha256=hashlib.sha256(tar.read_bytes()).hexdigest(),
        index_sha256=hashlib.sha256(index.read_bytes()).hexdigest(),
    )(split)


def _index(make: Callable[[np.ndarray], bytes]) -> Do:
    def do(split: Path) -> None:
        (split / INDEX).write_bytes(make(np.array(np.load(split / INDEX))))
        _vouched(split)

    return do


def _npy(array: np.ndarray, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


def _changed(rows: np.ndarray, column: str, value: Any) -> bytes:
    rows[column][4] = value
    return _npy(rows)


def _row(column: str, value: Any) -> Do:
    return _index(lambda rows: _changed(rows, column, value))


def _header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _npz(rows: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", bytes(2 * 10**8))
    return buffer.getvalue()


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


INDEXES: dict[str, Do] = {
    "offset behind the end": _row("offset", 10**9),
    "offset of 2^64 - 1": _row("offset", 2**64 - 1),
    "offset of another picture": _row("offset", 512),
    "offset in a header": _row("offset", 100),
    "size of nothing": _row("size", 0),
    "size of 2^63": _row("size", 2**63),
    "size of 2^64 - 1": _row("size", 2**64 - 1),
    "size too small": _row("size", 100),
    "label -1": _row("label", -1),
    "label 3 of 3": _row("label", 3),
    "label of 2^62": _row("label", 2**62),
    "another label": _index(lambda rows: _changed(rows, "label", (rows["label"][4] + 1) % 3)),
    "key twice": _index(lambda rows: _changed(rows, "key", rows["key"][0])),
    "key that is not UTF-8": _row("key", b"\xff\xfe\xfd"),
    "key that leads up": _row("key", b"../../evil"),
    "key without letters": _row("key", b""),
    "rows of another type": _index(lambda rows: _npy(np.zeros(9, "<f8"))),
    "rows in two dimensions": _index(lambda rows: _npy(rows.reshape(3, 3))),
    "rows in big endian": _index(lambda rows: _npy(rows.astype(INDEX_DTYPE.newbyteorder(">")))),
    "a row less": _index(lambda rows: _npy(rows[:-1])),
    "pickled objects": _index(lambda rows: _npy(np.array([_Evil()], object), pickled=True)),
    "archive that unpacks to 200 MB": _index(_npz),
    "header of 10^15 rows": _index(lambda rows: _header(_npy(rows)[10:128].replace(b"(9,)", b"(1000000000000000,)"))),
    "header of brackets": _index(lambda rows: _header(b"(" * 9000)),
    "header that calls": _index(lambda rows: _header(b"{'descr': __import__('os').system('touch evil')}")),
    "header that is no text": _index(lambda rows: _header(bytes(range(128, 256)))),
    "header of many objects": _index(lambda rows: _header(b"{'descr': '|O', 'fortran_order': False, 'shape': (9,)}\n")),
    "header of version 9": _index(lambda rows: b"\x93NUMPY\x09\x00" + bytes(100)),
}  # fmt: skip


def _tar(make: Callable[[list[tuple[tarfile.TarInfo, bytes]]], object]) -> Do:
    """The tar, its members changed; offsets stay where sizes do."""

    def do(split: Path) -> None:
        with tarfile.open(split / TAR) as archive:
            members = [(info, archive.extractfile(info).read()) for info in archive]  # type: ignore[union-attr]
        make(members)
        with tarfile.open(split / TAR, "w", format=tarfile.USTAR_FORMAT) as archive:
            for info, data in members:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        _vouched(split)

    return do


def _member(number: int, data: bytes | None = None, **values: Any) -> Do:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        info, old = members[number]
        for name, value in values.items():
            setattr(info, name, value)
        members[number] = info, old if data is None else data

    return _tar(change)


def _raw_tar(data: bytes) -> Do:
    def do(split: Path) -> None:
        (split / TAR).write_bytes(data)
        _vouched(split)

    return do


TARS: dict[str, Do] = {
    "picture named up": _member(0, name="../../evil.jpg"),
    "picture of an absolute name": _member(0, name="/tmp/rookery-evil.jpg"),
    "picture as a link": _member(0, b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "picture as a device": _member(0, b"", type=tarfile.CHRTYPE),
    "picture that is text": _member(2, b"no picture " * 30),
    "label as a word": _member(1, b"ant"),
    "label of 30 digits": _member(1, b"9" * 30),
    "label of 10 MB": _member(1, b"1" * 10**7),
    "label of another": _member(1, b"7"),
    "no label": _tar(lambda members: members.pop(1)),
    "picture twice": _tar(lambda members: members.insert(0, members[0])),
    "no members": _tar(lambda members: members.clear()),
    "not a tar": _raw_tar(generator("tar").randbytes(40_000)),
    "zeros": _raw_tar(bytes(40_000)),
}
CASES: dict[str, Do] = {
    f"{group}: {name}": do
    for group, cases in (
        ("damaged", DAMAGED),
        ("file", OTHERS),
        ("manifest", MANIFESTS),
        ("index", INDEXES),
        ("tar", TARS),
    )
    for name, do in cases.items()
}
