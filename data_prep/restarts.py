"""JPEGs with restart markers, made without touching a coefficient: the pixels stay what they are, to the last bit.

Between restart markers a decoder can begin anew, so a loader copies out the blocks of a crop and decodes little more.
Entropy-coded bits are carried over; only the first DC difference behind a marker is coded anew, from zero.

Tables and codes: ITU-T T.81, annexes C and F.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_prep.compiled import find_cache
from data_prep.jpeg_coding import (
    BASELINE,
    CATEGORIES,
    HUFFMAN,
    INTERVAL,
    OTHER_FRAMES,
    SCAN,
    HuffmanTable,
    Units,
    codes,
    huffman_tables,
    units,
)

# Tables for the differences, of luminance and chrominance: number of codes of 1, 2, ... 16 bits (annex K), for
# categories 0 to 11. Those of a picture's own tables may lack the large ones, which occur only behind a marker.
_DC_COUNTS = bytes([0, 1, 5] + [1] * 6 + [0] * 7), bytes([0, 3] + [1] * 9 + [0] * 5)
# Pixels between markers, at most: closer ones cost more bytes, others more blocks beside the crop.
_APART = 64


def restart_interval(width: int, block_width: int) -> int:
    """Coded units between restart markers: as many as divide a row, of at most 64 pixels together.

    Args:
        width: of the picture, in pixels.
        block_width: of a coded unit: 16 pixels for 4:2:0, 8 for greyscale.
    """
    row = -(-width // block_width)
    return max(units for units in range(1, _APART // block_width + 1) if row % units == 0)


def with_restarts(data: bytes, image: Image.Image | None = None) -> bytes:
    """The same picture with restart markers, some 3 % larger; unchanged where that can't be done.

    It can be done to baseline JPEGs with 1 or 3 components in one scan, without such markers. Metadata are kept.

    Args:
        data: a JPEG.
        image: its pixels, to compare with, where they are known.
    """
    find_cache(Path(__file__))
    from data_prep import restarts_loop  # compiled; only who asks for it pays for that

    coded = _parse(data)
    if coded is None:
        return data
    width, height, block_width, block_height, blocks = coded.units
    interval = restart_interval(width, block_width)
    across, down = -(-width // block_width), -(-height // block_height)
    # A difference takes up to 20 bits, and every byte may be 255, which a zero follows.
    room = 2 * (len(data) + 3 * across * down * len(blocks)) + 4 * (across * down // interval + 1)
    out = np.empty(room, np.uint8)
    size, end = restarts_loop.rewrite(
        np.frombuffer(data, np.uint8), coded.scan, across * down, interval, blocks, coded.lookup, _DC_CODES, out
    )
    if not size:
        return data
    header = bytes((0xFF, INTERVAL, 0, 4)) + interval.to_bytes(2, "big")
    made = b"".join(
        (data[: coded.start], _DC_TABLES, header, data[coded.start : coded.scan], out[:size].tobytes(), data[end:])
    )
    return made if _same_pixels(image or _opened(data), _opened(made)) else data


class _Coded(NamedTuple):
    """What the headers say.

    Attributes:
        start: offset of the scan header's marker.
        scan: offset of the first coded byte.
        lookup: of `restarts_loop.rewrite`.
    """

    start: int
    scan: int
    units: Units
    lookup: np.ndarray


def _parse(data: bytes) -> _Coded | None:
    at, frame = 2, b""
    lookup = np.zeros((4, 1 << 16), np.uint16)
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : at + 2 + size]
        if marker == SCAN:
            found = units(frame, segment)
            return None if found is None else _Coded(at, at + 4 + len(segment), found, lookup)
        if marker == INTERVAL or marker in OTHER_FRAMES:
            return None
        if marker == BASELINE:
            frame = segment
        if marker == HUFFMAN:
            tables = huffman_tables(segment)
            if tables is None:
                return None
            for table in tables:
                _fill(lookup[2 * table.kind + table.number], table)
        at += 2 + size
    return None


def _fill(lookup: np.ndarray, table: HuffmanTable) -> None:
    """Of all 16 bits the length of the code that they begin with, and its symbol."""
    lookup[:] = 0
    for symbol, length, code in table.codes():
        first = code << (16 - length)
        lookup[first : first + (1 << (16 - length))] = length << 8 | symbol


# A DHT segment with the tables, and what is in it.
_DC_TABLES = bytes((0xFF, HUFFMAN, 0, 2 + 2 * 29)) + b"".join(
    bytes([number]) + counts + bytes(range(CATEGORIES)) for number, counts in enumerate(_DC_COUNTS)
)
_DC_CODES = np.array([[length << 16 | code for length, code in codes(counts)] for counts in _DC_COUNTS], np.uint32)


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=["JPEG"])


def _same_pixels(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode and one.tobytes() == other.tobytes()
