"""The `.beton` file of FFCV (format version 2), as its plain `Loader` opens it: an image and a label per sample.

::

    header                    version, fields, page size, samples, where the table of allocations starts
    2 field descriptors       type and name of `image` and of `label`
    one `ROW` per sample      mode of the image, its width and height, where its bytes start; the label
    images                    JPEG files, or RGB pixels row by row
    table of allocations      one `ALLOCATION` per sample: its number, where its bytes start, and how many they are

Addresses count from the start of the file. FFCV may read by page, so no image crosses the boundary of one. Needs NumPy
alone: neither preparing nor training with such shards asks for the ffcv package.
"""

from __future__ import annotations

import os

import numpy as np

from data_prep.manifest import INDEX_DTYPE

SUFFIX = ".beton"
VERSION = 2
PAGE = 8 * 2**20  # as ffcv's own writer has it

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ROW = np.dtype({"names": ["image", "label"], "formats": [IMAGE, "<i8"], "offsets": [0, 16], "itemsize": 24})
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

JPEG, RAW = 0, 1
FIELDS = np.array([(2, b"image", bytes(1024)), (1, b"label", bytes(1024))], dtype=FIELD)
ROWS_START = HEADER.itemsize + FIELDS.nbytes


class BetonError(Exception):
    """The file is not such a `.beton`; the message says why."""


def raw_shape(row: bytes, offset: int) -> tuple[int, int] | None:
    """(height, width) of the image whose `ROW` these bytes are, None if it is a JPEG.

    Raises:
        BetonError: the image is not the one that starts at `offset`.
    """
    image = np.frombuffer(row, dtype=ROW)[0]["image"]
    if image["data_ptr"] != offset or image["mode"] not in (JPEG, RAW):
        raise BetonError(f"no image at byte {offset}, where the index has one")
    return (int(image["height"]), int(image["width"])) if image["mode"] == RAW else None


def scan(descriptor: int) -> np.ndarray:
    """The index that the file makes, without keys, which it doesn't hold: shape (samples,), dtype `INDEX_DTYPE`.

    Raises:
        BetonError: the file contradicts itself.
    """
    end = os.fstat(descriptor).st_size
    [header] = _read(descriptor, HEADER, 0, 1)
    if header["version"] != VERSION or header["num_fields"] != len(FIELDS):
        raise BetonError(f"not a .beton of version {VERSION} with {len(FIELDS)} fields")
    if _read(descriptor, FIELD, HEADER.itemsize, len(FIELDS)).tobytes() != FIELDS.tobytes():
        raise BetonError("its fields are not an image and a label")
    samples, table, page = (int(header[name]) for name in ("num_samples", "alloc_table_ptr", "page_size"))
    if table + samples * ALLOCATION.itemsize != end:
        raise BetonError(f"{end} bytes, but its header says {table + samples * ALLOCATION.itemsize}")
    if page < 1 or page & (page - 1):
        raise BetonError(f"pages of {page} bytes, which is no power of two")
    rows = _read(descriptor, ROW, ROWS_START, samples)
    allocations = _read(descriptor, ALLOCATION, table, samples)
    start, size, image = allocations["ptr"], allocations["size"], rows["image"]
    first, last = start // np.uint64(page), (start + size - np.uint64(1)) // np.uint64(page)
    raw_size = image["height"].astype(np.uint64) * image["width"] * np.uint64(3)
    for wrong, what in (
        (allocations["sample_id"] != np.arange(samples), "its allocation is another sample's"),
        (start != image["data_ptr"], "its row and its allocation disagree"),
        (size == 0, "it is empty"),
        (start < np.append(np.uint64(ROWS_START + rows.nbytes), (start + size)[:-1]), "it overlaps what is before it"),
        (start + size > table, "it ends behind the images"),
        (first != last, "it crosses a page boundary"),
        (image["mode"] > RAW, "its mode is unknown"),
        ((image["mode"] == RAW) & (raw_size != size), "it does not have width x height x 3 bytes"),
    ):
        if wrong.any():
            raise BetonError(f"sample {np.flatnonzero(wrong)[0]}: {what}")
    index = np.zeros(samples, dtype=INDEX_DTYPE)
    index["offset"], index["size"], index["label"] = start, size, rows["label"]
    return index


def _read(descriptor: int, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    if offset + count * dtype.itemsize > os.fstat(descriptor).st_size:
        raise BetonError("it is cut off")
    data = b""
    while len(data) < count * dtype.itemsize:  # one call of the system returns 2 GiB at most
        data += os.pread(descriptor, count * dtype.itemsize - len(data), offset + len(data))
    return np.frombuffer(data, dtype=dtype)
