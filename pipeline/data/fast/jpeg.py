"""Parts of a JPEG, decoded without the rest.

A loader crops nearly every picture. Of the blocks outside of the crop only the codes are read, and where restart
markers divide the data into segments that fit into a row of blocks (`rookery prep --resize` writes such files), not
even these. What is decoded has the numbers of libjpeg's accurate transform and smooth chrominance, to the last bit.

Numbers of markers and fields: ITU-T T.81, annex B.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from data_prep.jpeg_coding import BASELINE, HUFFMAN, INTERVAL, OTHER_FRAMES, SCAN, Units, units
from data_prep.manifest import is_absurd
from pipeline.data.augment.crop import Box
from pipeline.data.augment.lazy import LazyModule

huffman = LazyModule("pipeline.data.fast.huffman")
scan = LazyModule("pipeline.data.fast.scan")
segments = LazyModule("pipeline.data.fast.segments")
upsample = LazyModule("pipeline.data.fast.upsample")

MAGIC = b"\xff\xd8\xff"
_END = b"\xff\xd9"
_QUANTIZATION, _JFIF, _ADOBE = 0xDB, 0xE0, 0xEE
_READ = OTHER_FRAMES | {BASELINE, HUFFMAN, INTERVAL, SCAN, _QUANTIZATION, _JFIF, _ADOBE}
# A pixel is made out of the samples of chrominance around it, which lie up to so many pixels away.
_AROUND = 2
# Factors of sampling of luminance, where both of chrominance are 1: 4:4:4, 4:2:2 and 4:2:0.
_SAMPLINGS = ((1, 1), (2, 1), (2, 2))
# Time for a unit that is decoded and for one that is only passed; libjpeg-turbo's for one is 1.
_DECODED, _PASSED = 1.05, 0.35
# Bytes that `scan.decode` wants behind the coded ones.
_SPARE = 8192


class _Header(NamedTuple):
    """What stands before the coded bytes of a baseline JPEG.

    Attributes:
        scan: offset of the first coded byte.
        frame: segment of the frame header.
        units: the coded units.
        interval: units between restart markers; 0: there are none.
        huffman, quantization: the segments that define tables.
    """

    scan: int
    frame: bytes
    units: Units
    interval: int
    huffman: tuple[bytes, ...]
    quantization: tuple[bytes, ...]


def decode_box(data: bytes, wanted: Callable[[int, int], Box]) -> tuple[np.ndarray, Box, int, int] | None:
    """The wanted part of a JPEG, each pixel as in the whole picture.

    Args:
        wanted: (width, height) of the picture to the part that is needed.

    Returns:
        (h, w, 3) uint8 RGB, where it lies in the picture, width and height of that. None: not that kind of JPEG,
        damaged, or so much of it is wanted that libjpeg-turbo is faster.
    """
    # Without its end mark it is cut short, which decoding part of it would not show.
    header = _header(data) if _END in data[-64:] else None
    if header is None or is_absurd(header.units.width, header.units.height):
        return None
    steps = _steps(header.quantization, header.frame)
    tables = _tables(header.huffman)
    if steps is None or tables is None:
        return None
    width, height, unit_width, unit_height, _ = header.units
    box = wanted(width, height)
    across, down = -(-width // unit_width), -(-height // unit_height)
    top = max(box.top - _AROUND, 0) // unit_height
    left = max(box.left - _AROUND, 0) // unit_width
    bottom = min(-(-(box.top + box.height + _AROUND) // unit_height), down)
    right = min(-(-(box.left + box.width + _AROUND) // unit_width), across)
    coded, interval, place = np.frombuffer(data, np.uint8), header.interval, (top, bottom, left, right)
    marked = 0 < interval <= across and across % interval == 0
    if marked:
        left, right = left // interval * interval, -(-right // interval) * interval
    decoded = (bottom - top) * (right - left)
    passed = 0 if marked else (bottom - 1) * across + right - decoded
    if _DECODED * decoded + _PASSED * passed > across * down:
        return None
    if marked:
        copy = _scratch("copy", len(data))
        row = across // interval, top, bottom, left // interval, right // interval
        coded = copy[: segments.copy(coded, header.scan, *row, copy)]
        across, place = right - left, (0, bottom - top, 0, right - left)
    found = header.units.blocks
    blocks, planes = np.empty((len(found), 7), np.int64), np.empty((1 + int(found[-1, 0]), 2), np.int64)
    size = scan.arrange(found, unit_width // 8, unit_height // 8, bottom - top, right - left, planes, blocks)
    memory, plain = _scratch("planes", size), _scratch("plain", len(coded) + _SPARE)
    eights = memory[: len(memory) // 8 * 8].view(np.uint64)
    if not scan.decode(coded, header.scan, across, interval, *place, blocks, steps, *tables, plain, eights):
        return None
    out = np.empty((box.height, box.width, 3), np.uint8)
    if len(planes) == 1:
        y, x = box.top - top * unit_height, box.left - left * unit_width
        plane = memory[:size].reshape(-1, planes[0, 1])
        out[:] = plane[y : y + box.height, x : x + box.width, None]
    else:
        corners = box.top, box.left, top * unit_height, left * unit_width
        where = np.array([*corners, width, height, unit_width // 8, unit_height // 8], np.int64)
        upsample.to_rgb(memory, planes, where, out)
    return out, box, width, height


_memory: dict[str, np.ndarray] = {}


def _scratch(name: str, size: int) -> np.ndarray:
    """Memory that is written over by the next call."""
    if name not in _memory or len(_memory[name]) < size:
        _memory[name] = np.empty(size + size // 2, np.uint8)
    return _memory[name]


@lru_cache(16)  # of pictures that have the usual codes
def _tables(found: tuple[bytes, ...]) -> Any:
    return huffman.read_tables(found)


@lru_cache(64)
def _steps(quantization: tuple[bytes, ...], frame: bytes) -> np.ndarray | None:
    """(components, 64) int32: what coefficients are multiplied with, in the order in which they are coded."""
    tables = {}
    for segment in quantization:
        for at in range(0, len(segment), 65):
            table = segment[at + 1 : at + 65]
            if segment[at] > 3 or len(table) != 64:  # of two bytes each, or damaged
                return None
            tables[segment[at]] = table
    used = [tables.get(frame[8 + 3 * i]) for i in range(frame[5])]
    if any(table is None for table in used):
        return None
    return np.array([list(table) for table in used if table is not None], np.int32)


def _header(data: bytes) -> _Header | None:
    if data[:3] != MAGIC:
        return None
    at, frame, interval, jfif, adobe = 2, b"", 0, False, -1
    tables: dict[int, list[bytes]] = {HUFFMAN: [], _QUANTIZATION: []}
    while at + 20 < len(data) and data[at] == 0xFF:
        marker, size = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker not in _READ:  # metadata, which may be long
            at += 2 + size
            continue
        segment = data[at + 4 : at + 2 + size]
        if marker == SCAN:
            found = units(frame, segment)
            if found is None or at + 2 + size >= len(data) or not _is_usual(frame, found, jfif, adobe):
                return None
            defined = tuple(tables[HUFFMAN]), tuple(tables[_QUANTIZATION])
            return _Header(at + 2 + size, frame, found, interval, *defined)
        if marker in OTHER_FRAMES or (marker == BASELINE and frame):
            return None
        if marker == INTERVAL:
            interval = int.from_bytes(segment[:2], "big")
        elif marker == BASELINE:
            frame = segment
        elif marker in tables:
            tables[marker].append(segment)
        elif marker == _JFIF and segment[:5] == b"JFIF\0":
            jfif = True
        elif marker == _ADOBE and segment[:5] == b"Adobe" and len(segment) >= 12:
            adobe = segment[11]
        at += 2 + size
    return None


def _is_usual(frame: bytes, units: Units, jfif: bool, adobe: int) -> bool:
    """Whether its chrominance is sampled as it is made larger here, and its colours are those of JFIF."""
    if frame[5] == 1:
        return True
    factors = [frame[7 + 3 * i] for i in range(3)]
    across, down = units.block_width // 8, units.block_height // 8
    if factors != [across << 4 | down, 0x11, 0x11] or (across, down) not in _SAMPLINGS:
        return False
    if across == 2 and units.width <= 4:  # so narrow a picture is made larger in another way
        return False
    # Without either marker the numbers of the components tell.
    return jfif or adobe == 1 or (adobe < 0 and [frame[6 + 3 * i] for i in range(3)] == [1, 2, 3])
