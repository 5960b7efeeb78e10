"""JPEGs with restart markers, made without touching a coefficient: the pixels stay what they are, to the last bit.

Between restart markers a decoder can begin anew, so a loader copies out the blocks of a crop and decodes little more.
Entropy-coded bits are carried over; only the first DC difference behind a marker is coded anew, from zero.

Numbers of markers and fields: ITU-T T.81, annex B; tables and codes: annexes C and F.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

_BASELINE, _HUFFMAN, _END, _SCAN, _INTERVAL = 0xC0, 0xC4, 0xD9, 0xDA, 0xDD
_FRAMES = frozenset(range(0xC0, 0xD0)) - {_HUFFMAN, 0xC8, 0xCC}
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
    from data_prep import restarts_loop  # compiled; only who asks for it pays for that

    coded = _parse(data)
    if coded is None:
        return data
    interval = restart_interval(coded.width, coded.block_width)
    across, down = -(-coded.width // coded.block_width), -(-coded.height // coded.block_height)
    # A difference takes up to 20 bits, and every byte may be 255, which a zero follows.
    room = 2 * (len(data) + 3 * across * down * len(coded.blocks)) + 4 * (across * down // interval + 1)
    out = np.empty(room, np.uint8)
    size, end = restarts_loop.rewrite(
        np.frombuffer(data, np.uint8), coded.scan, across * down, interval, coded.blocks, coded.lookup, _DC_CODES, out
    )
    if not size:
        return data
    header = bytes((0xFF, _INTERVAL, 0, 4)) + interval.to_bytes(2, "big")
    made = b"".join(
        (data[: coded.start], _DC_TABLES, header, data[coded.start : coded.scan], out[:size].tobytes(), data[end:])
    )
    return made if _same_pixels(image or _opened(data), _opened(made)) else data


class _Coded(NamedTuple):
    """What the headers say.

    Attributes:
        start: offset of the scan header's marker.
        scan: offset of the first coded byte.
        width, height: in pixels.
        block_width, block_height: pixels of a coded unit.
        blocks: (n, 3) int64, for each block of a unit: component, DC table, AC table.
        lookup: of `restarts_loop.rewrite`.
    """

    start: int
    scan: int
    width: int
    height: int
    block_width: int
    block_height: int
    blocks: np.ndarray
    lookup: np.ndarray


def _parse(data: bytes) -> _Coded | None:
    at = 2
    frame = b""
    lookup = np.zeros((4, 1 << 16), np.uint16)
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + size]
        if marker == _SCAN:
            return _scan_of(data, at, frame, body, lookup)
        if marker == _INTERVAL or (marker in _FRAMES and marker != _BASELINE):
            return None
        if marker == _BASELINE:
            frame = body
        if marker == _HUFFMAN and not _read_tables(body, lookup):
            return None
        at += 2 + size
    return None


def _scan_of(data: bytes, at: int, frame: bytes, header: bytes, lookup: np.ndarray) -> _Coded | None:
    components = frame[5] if len(frame) > 5 else 0
    if components not in (1, 3) or len(frame) != 6 + 3 * components or frame[0] != 8:
        return None
    if len(header) != 4 + 2 * components or header[0] != components or header[-3:] != b"\x00\x3f\x00":
        return None
    factors = [(frame[7 + 3 * i] >> 4, frame[7 + 3 * i] & 15) for i in range(components)]
    if components == 1:  # has blocks of 8 x 8, whatever it says
        factors = [(1, 1)]
    across, down = (max(f[side] for f in factors) for side in (0, 1))
    if not (across in (1, 2, 4) and down in (1, 2, 4) and all(x and y for x, y in factors)):
        return None
    blocks = []
    for i, (x, y) in enumerate(factors):
        if header[1 + 2 * i] != frame[6 + 3 * i] or header[2 + 2 * i] & 0xEE:
            return None
        blocks += [(i, header[2 + 2 * i] >> 4, header[2 + 2 * i] & 15)] * (x * y)
    height, width = (int.from_bytes(frame[i : i + 2], "big") for i in (1, 3))
    scan = at + 4 + len(header)
    if not height or not width:
        return None
    return _Coded(at, scan, width, height, 8 * across, 8 * down, np.array(blocks, np.int64), lookup)


def _read_tables(body: bytes, lookup: np.ndarray) -> bool:
    """Read Huffman tables; returns whether they are whole.

    Args:
        lookup: (4, 65536), DC tables then AC tables: of the next 16 bits the length of the code and its symbol.
    """
    at = 0
    while at + 17 <= len(body):
        kind, number = body[at] >> 4, body[at] & 15
        counts = body[at + 1 : at + 17]
        symbols = body[at + 17 : at + 17 + sum(counts)]
        if kind > 1 or number > 1 or len(symbols) != sum(counts):
            return False
        at += 17 + len(symbols)
        table = lookup[2 * kind + number]
        table[:] = 0
        for symbol, (length, code) in zip(symbols, _codes(counts), strict=True):
            first = code << (16 - length)
            if first >= 1 << 16 or (kind == 0 and symbol > 15):
                return False
            table[first : first + (1 << (16 - length))] = length << 8 | symbol
    return at == len(body)


def _codes(counts: bytes) -> Iterator[tuple[int, int]]:
    """Length and code of the symbols of a table, in their order."""
    code = 0
    for length, count in enumerate(counts, 1):
        for _ in range(count):
            yield length, code
            code += 1
        code <<= 1


# A DHT segment with the tables, and what is in it.
_DC_TABLES = bytes((0xFF, _HUFFMAN, 0, 2 + 2 * 29)) + b"".join(
    bytes([number]) + counts + bytes(range(12)) for number, counts in enumerate(_DC_COUNTS)
)
_DC_CODES = np.array([[length << 16 | code for length, code in _codes(counts)] for counts in _DC_COUNTS], np.uint32)


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=["JPEG"])


def _same_pixels(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode and one.tobytes() == other.tobytes()
