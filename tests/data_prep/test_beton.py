"""The `.beton` itself: deterministic, within its pages, and its contradictions are noticed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from data_prep import beton
from data_prep.beton import BetonError
from data_prep.betonshard import BetonShardWriter
from data_prep.images import RAW, Usable
from data_prep.manifest import INDEX_DTYPE

SAMPLES = [
    ("00000000_a", Usable(b"\xff\xd8" + b"x" * 510, "jpg", 31, 17), 3),
    ("00000001", Usable(bytes(range(24)), RAW, 2, 4), 0),
    ("00000002_c-d", Usable(bytes(range(256)) * 6, RAW, 32, 16), 999),
]
PLANNED = 5  # two of them were dropped
SHA256 = "93a62a9d6163df3b840df992dd16c0203997ce09a7a1c220159e8f4f316c7f9a"


def write(folder: Path, samples: list[tuple[str, Usable, int]], planned: int) -> Path:
    writer = BetonShardWriter(folder / "s.beton", folder / "s.idx.npy", planned)
    for sample in samples:
        writer.add(*sample)
    writer.close()
    for path, size, sha256 in (
        (folder / "s.beton", writer.bytes, writer.sha256),
        (folder / "s.idx.npy", writer.index_bytes, writer.index_sha256),
    ):
        assert path.stat().st_size == size
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    return folder / "s.beton"


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write(tmp_path, SAMPLES, PLANNED)


def scanned(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        return beton.scan(file.fileno())


def assert_scanned(path: Path, index: np.ndarray) -> None:
    """The file says what its index says, but for the keys."""
    found = scanned(path)
    for column in ("offset", "size", "label"):
        np.testing.assert_array_equal(found[column], index[column])


def test_the_bytes_never_change(shard: Path) -> None:
    assert hashlib.sha256(shard.read_bytes()).hexdigest() == SHA256


def test_the_index_finds_every_image(shard: Path) -> None:
    index, data = np.load(shard.with_name("s.idx.npy")), shard.read_bytes()
    assert index.dtype == INDEX_DTYPE
    for number, (row, (key, image, label)) in enumerate(zip(index, SAMPLES, strict=True)):
        assert data[row["offset"] : row["offset"] + row["size"]] == image.data
        assert (row["key"].decode(), row["label"]) == (key, label)
        at = beton.ROWS_START + number * beton.ROW.itemsize
        shape = beton.raw_shape(data[at : at + beton.ROW.itemsize], int(row["offset"]))
        assert shape == ((image.height, image.width) if image.extension == RAW else None)
    assert_scanned(shard, index)


def test_a_row_of_another_image_is_refused(shard: Path) -> None:
    data = shard.read_bytes()
    row = data[beton.ROWS_START : beton.ROWS_START + beton.ROW.itemsize]
    with pytest.raises(BetonError, match="no image at byte 7, where the index has one"):
        beton.raw_shape(row, 7)


def test_no_image_crosses_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of up to three pages; the pages grow to hold them, and stay right for those before."""
    monkeypatch.setattr(beton, "PAGE", 4096)
    sizes = np.random.default_rng(0).integers(1, 4096, 60).tolist()
    sizes[20], sizes[40] = 4097, 11_000
    samples = [(str(n), Usable(bytes([n]) * size, "jpg", 1, 1), n) for n, size in enumerate(sizes)]
    path = write(tmp_path, samples, len(samples))
    data, index = path.read_bytes(), np.load(tmp_path / "s.idx.npy")
    page = int(np.frombuffer(data, beton.HEADER, 1)["page_size"][0])
    assert page == 16_384
    for row, (_, image, _) in zip(index, samples, strict=True):
        first, last = int(row["offset"]), int(row["offset"] + row["size"]) - 1
        assert first // page == last // page
        assert data[first : last + 1] == image.data
    assert len(data) < sum(sizes) + 60 * 2048 + 3 * page
    assert_scanned(path, index)


def edit(path: Path, dtype: np.dtype, at: int, **values: int) -> None:
    data = bytearray(path.read_bytes())
    record = np.frombuffer(data, dtype, 1, at)
    for name, value in values.items():
        (record["image"] if name in beton.IMAGE.names else record)[name] = value
    path.write_bytes(data)


SECOND_ROW = beton.ROWS_START + beton.ROW.itemsize


@pytest.mark.parametrize(
    ("dtype", "at", "values", "said"),
    [
        (beton.HEADER, 0, {"version": 1}, "not a .beton of version 2 with 2 fields"),
        (beton.HEADER, 0, {"num_fields": 3}, "not a .beton of version 2 with 2 fields"),
        (beton.HEADER, 0, {"page_size": 5000}, "pages of 5000 bytes, which is no power of two"),
        (beton.HEADER, 0, {"page_size": 512}, "sample 0: it crosses a page boundary"),
        (beton.HEADER, 0, {"num_samples": 2}, "but its header says"),
        (beton.HEADER, 0, {"alloc_table_ptr": 9}, "but its header says"),
        (beton.FIELD, beton.HEADER.itemsize, {"type_id": 1}, "its fields are not an image and a label"),
        (beton.ROW, SECOND_ROW, {"mode": 2}, "sample 1: its mode is unknown"),
        (beton.ROW, SECOND_ROW, {"width": 3}, "sample 1: it does not have width x height x 3 bytes"),
        (beton.ROW, SECOND_ROW, {"data_ptr": 3000}, "sample 1: its row and its allocation disagree"),
        (beton.ALLOCATION, -48, {"sample_id": 2}, "sample 1: its allocation is another sample's"),
        (beton.ALLOCATION, -48, {"size": 0}, "sample 1: it is empty"),
        (beton.ALLOCATION, -48, {"size": 25}, "sample 2: it overlaps what is before it"),
        (beton.ALLOCATION, -24, {"size": 1537}, "sample 2: it ends behind the images"),
    ],
)
def test_contradictions(shard: Path, dtype: np.dtype, at: int, values: dict[str, int], said: str) -> None:
    edit(shard, dtype, at if at >= 0 else shard.stat().st_size + at, **values)
    with pytest.raises(BetonError, match=said):
        scanned(shard)


@pytest.mark.parametrize("length", [0, 10, 24, 1000, 2106, 2200])
def test_a_file_that_is_cut_off(shard: Path, length: int) -> None:
    os.truncate(shard, length)
    with pytest.raises(BetonError, match=r"cut off|but its header says"):
        scanned(shard)
