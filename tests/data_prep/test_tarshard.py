"""The tar itself: standard, deterministic, and the index points into it."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.images import Usable
from data_prep.manifest import INDEX_DTYPE
from data_prep.tarscan import TarError, members
from data_prep.tarshard import TarShardWriter
from tests.data_prep.helpers import image_of, make_tar, read_plain

SAMPLES = [
    ("00000000_a", "jpg", b"x" * 512, 3),
    ("00000001", "png", b"", 0),
    ("00000002_c-d", "webp", bytes(range(256)) * 7, 999),
]
SHA256 = "2cab3de4dc7ad24359a817f6983b65f6f06b622c6419c0fdbcf71f67cfab6af0"


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    writer = TarShardWriter(tmp_path / "s.tar", tmp_path / "s.idx.npy")
    for key, extension, data, label in SAMPLES:
        writer.add(key, Usable(data, extension, 1, 1), label)
    writer.close()
    for path, size, sha256 in (
        (tmp_path / "s.tar", writer.bytes, writer.sha256),
        (tmp_path / "s.idx.npy", writer.index_bytes, writer.index_sha256),
    ):
        assert path.stat().st_size == size
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    return tmp_path / "s.tar"


def test_the_bytes_never_change(shard: Path) -> None:
    assert hashlib.sha256(shard.read_bytes()).hexdigest() == SHA256


def test_headers_carry_nothing_of_this_machine(shard: Path) -> None:
    with tarfile.open(shard) as archive:
        found = archive.getmembers()
    assert [info.name for info in found] == [
        name for key, extension, _, _ in SAMPLES for name in (f"{key}.{extension}", f"{key}.cls")
    ]
    facts = {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode, i.type, bool(i.pax_headers)) for i in found}
    assert facts == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE, False)}


def test_the_index_finds_every_image(shard: Path) -> None:
    index = np.load(shard.with_name("s.idx.npy"), mmap_mode="r")
    data = shard.read_bytes()
    assert index.dtype == INDEX_DTYPE
    for row, (key, _, image, label) in zip(index, SAMPLES, strict=True):
        assert data[row["offset"] : row["offset"] + row["size"]] == image
        assert (row["key"].decode(), row["label"]) == (key, label)


def test_plain_webdataset_reads_it(shard: Path) -> None:
    samples = read_plain(shard.parent)
    assert [(s["__key__"], image_of(s), int(s["cls"])) for s in samples] == [
        (key, data, label) for key, _, data, label in SAMPLES
    ]


def test_the_scan_agrees_with_tarfile(shard: Path) -> None:
    with tarfile.open(shard) as archive:
        expected = [(info.name, info.offset_data, info.size) for info in archive]
    with open(shard, "rb") as file:
        assert list(members(file.fileno())) == expected


def test_every_truncation_is_noticed(shard: Path) -> None:
    data = shard.read_bytes()
    path = shard.with_name("cut.tar")
    end_mark = len(data) - 1024
    for length in (0, 1, 511, 512, 700, 1024, 1600, end_mark - 512, end_mark, end_mark + 511):
        path.write_bytes(data[:length])
        with open(path, "rb") as file, pytest.raises(TarError, match="truncated"):
            list(members(file.fileno()))


def test_a_damaged_header_is_noticed(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "t.tar", {"a": b"1" * 600, "b": b"2"})
    data = bytearray(path.read_bytes())
    data[1536 + 10] ^= 1  # in the name of b, which the header's checksum covers
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(TarError, match="damaged header at byte 1536"):
            list(members(descriptor))
    finally:
        os.close(descriptor)
