"""ILSVRC2012 archives and development kits that are damaged, or made to do harm."""

from __future__ import annotations

import gzip
import os
import tarfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tests.data_prep.fuzz_folders import Make, single, sparse
from tests.data_prep.helpers import encoded, pixels, tar_bytes
from tests.data_prep.test_ilsvrc import devkit, train_tar, val_tar
from tests.fuzzing import damaged, generator


def header(name: str | bytes, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> bytearray:
    """A header with a right checksum, whatever stands in it."""
    info = tarfile.TarInfo("x")
    info.type, info.linkname = kind, link
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[:100] = (name.encode() if isinstance(name, str) else name).ljust(100, b"\0")
    octal = 0 <= size < 8**11
    block[124:136] = b"%011o\0" % size if octal else bytes([0x80 if size > 0 else 0xFF]) + _base256(size)
    return with_sum(block)


def _base256(size: int) -> bytes:
    return (size % 2**88).to_bytes(11, "big")


def with_sum(block: bytearray) -> bytearray:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return block


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def _inner(**more: bytes) -> bytes:
    """A class tar with two good pictures."""
    return tar_bytes({f"n_{i}.JPEG": encoded(pixels(i)) for i in range(2)} | more)


def _train(inner: Mapping[str, bytes], before: bytes = b"") -> Make:
    """A train tar of one whole class and of these; `before` is put in front of it."""
    return single(lambda p: p.write_bytes(before + tar_bytes({"n00000001.tar": _inner(), **inner})), "train.tar")


def _class_with(members: bytes) -> Make:
    """A train tar whose second class begins with these bytes."""
    return _train({"n00000002.tar": members + _inner()})


def _train_damaged(how: str, name: str, top: Path) -> Path:
    path = train_tar(top / "train.tar")
    draw, whole = generator(name), path.read_bytes()
    if how == "header":  # one of a member, where bits count most
        data, place = bytearray(whole), 512 * draw.randrange(len(whole) // 512)
        for _ in range(3):
            data[place + draw.randrange(512)] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    else:
        path.write_bytes(damaged(whole, how, draw))
    return path


def _pax(record: bytes) -> bytes:
    """A pax header of one record, whose length counts itself."""
    length = next(n for n in range(len(record), len(record) + 9) if len(b"%d %s\n" % (n, record)) == n)
    return header("pax", tarfile.XHDTYPE, length) + _padded(b"%d %s\n" % (length, record))


_EVIL = encoded(pixels(3))
ILSVRC_TRAIN: dict[str, Make] = {
    **{
        f"train {how} {number}": partial(_train_damaged, how, f"train {how} {number}")
        for how, times in (("cut", 3), ("flipped", 4), ("header", 8), ("zeroed", 2), ("spliced", 2))
        for number in range(times)
    },
    "class that is no tar": _train({"n00000002.tar": b"not a tar" * 100}),
    "class that is empty": _train({"n00000002.tar": b""}),
    "class without pictures": _train({"n00000002.tar": tar_bytes({})}),
    "class twice": _train({"x/n00000001.tar": _inner()}),
    "tar in a tar in a tar": _train({"n00000002.tar": _inner(**{"more.tar": tar_bytes({"a.JPEG": _EVIL})})}),
    "class named up": _train({"../../n00000002.tar": _inner()}),
    "class of an absolute name": _train({"/tmp/rookery-evil/n00000002.tar": _inner()}),
    "picture named up": _train({"n00000002.tar": _inner(**{"../../../evil.JPEG": _EVIL})}),
    "picture of an absolute name": _train({"n00000002.tar": _inner(**{"/tmp/rookery-evil.JPEG": _EVIL})}),
    "picture twice": _class_with(header("n_0.JPEG", size=len(_EVIL)) + _padded(_EVIL)),
    "name that is not UTF-8": _class_with(header(b"\xff\xfe.JPEG", size=len(_EVIL)) + _padded(_EVIL)),
    "picture as a link": _class_with(header("l.JPEG", tarfile.SYMTYPE, link="/etc/passwd")),
    "picture as a hard link": _class_with(header("l.JPEG", tarfile.LNKTYPE, link="../../outside")),
    "picture as a device": _class_with(header("d.JPEG", tarfile.CHRTYPE)),
    "picture as a pipe": _class_with(header("p.JPEG", tarfile.FIFOTYPE)),
    "folder": _class_with(header("d/", tarfile.DIRTYPE)),
    "class as a link": _train({}, before=header("n00000003.tar", tarfile.SYMTYPE, link="n00000001.tar")),
    "text beside the classes": _train({"readme.txt": b"hello"}),
    "size below nothing": _class_with(header("n.JPEG", size=-1024)),
    "size of 2^80": _class_with(header("n.JPEG", size=2**80)),
    "size that leads back": _train({}, before=header("n.tar", size=-512)),
    "name of 10 GB": _class_with(header("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=10**10)),
    "name of 2 MB": _class_with(
        header("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=2**21) + b"n" * 2**21 + header("n", size=0)
    ),
    "pax: size below nothing": _class_with(_pax(b"size=-1024") + header("n.JPEG")),
    "pax: size in words": _class_with(_pax(b"size=many") + header("n.JPEG")),
    "pax: size of 30 digits": _class_with(_pax(b"size=" + b"9" * 30) + header("n.JPEG")),
    "pax: size of 5,000 digits": _class_with(_pax(b"size=" + b"9" * 5000) + header("n.JPEG")),
    "pax: record of no length": _class_with(header("pax", tarfile.XHDTYPE, 20) + _padded(b"0 path=x\n" + bytes(11))),
    "pax: record of 5,000 digits": _class_with(
        header("pax", tarfile.XHDTYPE, 5100) + _padded(b"9" * 5000 + b" path=x\n" + bytes(92))
    ),
    "pax: name up": _class_with(_pax(b"path=../../../../evil.JPEG") + header("n.JPEG", size=5) + _padded(b"hello")),
    "name without a member": _train(
        {"n00000002.tar": header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 5) + _padded(b"abcde")}
    ),
}  # fmt: skip


def _large_class(top: Path) -> Path:
    """A class tar with a picture of 80 GB, most of which is a hole."""
    size = 80 * 10**9
    with open(top / "train.tar", "wb") as file:
        file.write(header("n00000001.tar", size=len(_inner())) + _padded(_inner()))
        file.write(header("n00000002.tar", size=size + 1536) + header("n.JPEG", size=size))
        file.seek(size, os.SEEK_CUR)
        file.write(bytes(4096))
    return top / "train.tar"


ILSVRC_TRAIN["picture of 80 GB"] = _large_class


def _val(change: Callable[[Path], object]) -> Make:
    """The val tar beside its devkit, after a change."""

    def make(top: Path) -> Path:
        path = val_tar(top / "ILSVRC2012_img_val.tar")
        devkit(top, archive=False)
        change(top)
        return path

    return make


_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
_META = "ILSVRC2012_devkit_t12/data/meta.mat"


def _rewrite(name: str, how: str, top: Path) -> None:
    path = top / name
    path.write_bytes(damaged(path.read_bytes(), how.split()[0], generator(f"{name} {how}")))


def packed_zeros(mebibytes: int) -> bytes:
    return gzip.compress(bytes(2**20)) * mebibytes  # a gzip file may be several, one after the other


def _packed_devkit(top: Path, before: bytes = b"", zeros: int = 0) -> None:
    """The devkit as an archive; `before` and so many MiB of zeros are put in front of it."""
    names = (_TRUTH, _META)
    files = {name: (top / name).read_bytes() for name in names}
    for name in names:
        (top / name).unlink()
    packed = gzip.compress(before) + packed_zeros(zeros) + gzip.compress(tar_bytes(files))
    (top / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(packed)


def _broken_pack(top: Path) -> None:
    _packed_devkit(top)
    path = top / "ILSVRC2012_devkit_t12.tar.gz"
    path.write_bytes(damaged(path.read_bytes(), "flipped", generator("pack")))


ILSVRC_VAL: dict[str, Make] = {
    "fewer labels": _val(lambda t: (t / _TRUTH).write_text("1\n2\n")),
    "no labels": _val(lambda t: (t / _TRUTH).write_bytes(b"")),
    "labels that don't exist": _val(lambda t: (t / _TRUTH).write_text("99\n" * 7)),
    "labels below nothing": _val(lambda t: (t / _TRUTH).write_text("-1\n" * 7)),
    "label of an inner node": _val(lambda t: (t / _TRUTH).write_text("5\n" * 7)),
    "labels of 10,000 digits": _val(lambda t: (t / _TRUTH).write_text("9" * 10_000)),
    "labels that are no text": _val(lambda t: (t / _TRUTH).write_bytes(generator("truth").randbytes(200))),
    "labels of 100 GB": _val(lambda t: sparse(t / _TRUTH, 10**11)),
    "meta.mat is empty": _val(lambda t: (t / _META).write_bytes(b"")),
    "meta.mat is missing": _val(lambda t: (t / _META).unlink()),
    **{
        f"meta.mat {how}": _val(partial(_rewrite, _META, how))
        for how in ("cut", "flipped", "flipped again", "flipped once more", "zeroed", "spliced")
    },
    "val cut": _val(partial(_rewrite, "ILSVRC2012_img_val.tar", "cut")),
    "val flipped": _val(partial(_rewrite, "ILSVRC2012_img_val.tar", "flipped")),
    "packed devkit": _val(_packed_devkit),
    "packed devkit flipped": _val(_broken_pack),
    "packed devkit of 1,200 MiB": _val(
        partial(_packed_devkit, before=bytes(header("zeros", size=1200 * 2**20)), zeros=1200)
    ),
    "packed devkit with a name of 600 MiB": _val(
        partial(_packed_devkit, before=bytes(header("x", tarfile.GNUTYPE_LONGNAME, 600 * 2**20)), zeros=600)
    ),
    "packed devkit named up": _val(partial(_packed_devkit, before=tar_bytes({"../../../evil": b"x"})[:1024])),
}
